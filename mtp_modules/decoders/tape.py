"""The kernels of a function of tensors, recorded once and launched again without the Python between them.

A recording is a straight line: the same kernels, on the same memory, with the same sizes. What differs from one run to
the next has to lie in the tensors that the recorded function reads.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from types import BuiltinFunctionType
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor

_T = TypeVar("_T")
_Operator = torch._ops.OpOverload

_OF_THE_HOST = frozenset({"aten::_local_scalar_dense", "aten::lift_fresh", "aten::is_nonzero", "aten::equal"})
"""Between tensors and numbers of the host, either way: a recording would keep what they were."""
_BY_INDEX = frozenset({"aten::index", "aten::index_put_", "aten::index_put", "aten::_unsafe_index"})
_METHODS = {f"aten::{name}": getattr(torch.Tensor, name) for name in ("copy_", "index_copy_", "masked_fill_")}
"""Called by a shorter way than through their operator."""


class Recording:
    """What computes a result again, into the very same tensors.

    Args:
        replay: Does so.
        calls: The calls that it makes, if it makes them one by one.
    """

    def __init__(self, replay: Callable[[], object], calls: Sequence["_Call"] = ()) -> None:
        self.replay, self._calls = replay, calls

    def share_memory(self, kept: Sequence[Tensor]) -> None:
        """Let what is made later on use the memory of what is not needed any more, so that it stays in the cache.

        Args:
            kept: Tensors that are looked at when all is over; nothing else that was made means anything then.
        """
        _share_memory(self._calls, _memory(kept))


def record(function: Callable[[], _T], device: torch.device) -> tuple[_T, Recording]:
    """Call a function, and return its result, and what computes it again.

    On a GPU it becomes a CUDA graph. Elsewhere its kernels are called one after the other; what they write goes where
    it went when they were recorded, so that looking at memory in another way, and constants, need no call.

    Args:
        function: Computes with tensors alone. On a GPU it is called twice, so it has to start from the same each time.
        device: Where its tensors are.

    Raises:
        ValueError: If the function looks at numbers in a tensor, or makes a tensor of data that the host has.
    """
    return _record_graph(function, device) if device.type == "cuda" else _record_kernels(function)


def _record_graph(function: Callable[[], _T], device: torch.device) -> tuple[_T, Recording]:
    """Capture a CUDA graph, after a call on the same stream in which libraries set up what they need."""
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _Watch(device), _NoNumbers():
            function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            result = function()
        graph.replay()
    return result, Recording(graph.replay)


def _record_kernels(function: Callable[[], _T]) -> tuple[_T, Recording]:
    tape = _Tape()
    with tape, _NoNumbers():
        result = function()
    calls = [call for call in tape.calls if not call.constant]
    kernels = [call.kernel for call in calls]

    def replay() -> None:
        for kernel in kernels:
            kernel()

    return result, Recording(replay, calls)


def _refuse_numbers(name: str) -> None:
    refuse(
        "record_for_decoding",
        f"a round calls {name}, which takes numbers to the host or from it; decode with the model itself.",
    )


class _NoNumbers(TorchFunctionMode):
    """Refuse the ways from a tensor to its numbers that lie on no tape."""

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            _refuse_numbers(f"Tensor.{func.__name__}")
        return func(*args, **({} if kwargs is None else kwargs))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse operators that ask the host, and tensors that are elsewhere: a graph would not compute them again."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(
        self, func: _Operator, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = {} if kwargs is None else kwargs
        if _asks_the_host(func, args):
            _refuse_numbers(func._schema.name)
        result = func(*args, **kwargs)
        if any(tensor.device.type != self.device.type and tensor.dim() for tensor in _tensors(result)):
            _refuse_numbers(f"{func._schema.name} on another device")
        return result


class _Call:
    """One call of the tape.

    Attributes:
        kernel: Computes again what it made.
        made: The tensors that it made, in memory of their own.
        constant: Whether that is always the same; then it is called only if the tensors are written to later on.
    """

    def __init__(self, kernel: Callable[[], object], made: list[Tensor], *, constant: bool = False) -> None:
        self.kernel, self.made, self.constant = kernel, made, constant


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down every kernel that is called.

    The tape keeps all tensors, so that memory is never used twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.constants: dict[int, _Call] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(
        self, func: _Operator, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = {} if kwargs is None else kwargs
        if _asks_the_host(func, args):
            _refuse_numbers(func._schema.name)
        before = len(self.calls)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._note(func, args, kwargs, result)
        elif self._is_longer_in_parts(before, _tensors((args, kwargs)), _tensors(result)):
            del self.calls[before:]
            self._note(func, args, kwargs, result)
        return result

    def _is_longer_in_parts(self, before: int, given: list[Tensor], made: list[Tensor]) -> bool:
        """Say whether an operator is better called as a whole than by the kernels it has come down to."""
        parts = [call for call in self.calls[before:] if not call.constant]
        outputs = sum(len(call.made) for call in parts)
        return outputs > len(made) and not _memory(given) & _memory(made)

    def _note(self, func: _Operator, args: Sequence[Any], kwargs: dict[str, Any], result: object) -> None:
        given, made = _tensors((args, kwargs)), _tensors(result)
        self.kept += [*given, *made]
        if func._schema.is_mutable:
            for memory in _memory(_written(func, args, kwargs)) & self.constants.keys():
                self.constants.pop(memory).constant = False
            kernel = partial(_METHODS.get(func._schema.name, func), *args, **kwargs)
            self.calls.append(_Call(kernel, []))
        elif not _memory(made) <= _memory(given):  # otherwise another look at memory
            drawn = torch.Tag.nondeterministic_seeded in func.tags
            if drawn or not _memory(given) <= self.constants.keys():
                fresh = [tensor for tensor in made if not _memory([tensor]) <= _memory(given)]
                self.calls.append(_Call(_into(func, args, kwargs, made), fresh))
            else:
                first = [tensor.clone() for tensor in made]
                call = _Call(partial(_copy, made, first), made, constant=True)
                self.calls.append(call)
                self.constants |= dict.fromkeys(_memory(made), call)


def _asks_the_host(func: _Operator, args: Sequence[Any]) -> bool:
    """Say whether an operator moves numbers between tensors and the host, or must know them to say what it makes."""
    name = func._schema.name
    if name in _BY_INDEX:  # a mask is counted before it is an index
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))
    return name in _OF_THE_HOST or torch.Tag.dynamic_output_shape in func.tags


def _looked_at(call: object) -> list[Tensor]:
    """Return the tensors that a call reads and writes."""
    if not isinstance(call, partial):
        return _tensors(call)
    return [tensor for part in (*call.args, *call.keywords.values()) for tensor in _looked_at(part)]


def _share_memory(calls: Sequence[_Call], kept: set[int]) -> None:
    """Give tensors other memory: in the order of the calls, that of tensors which no later call looks at."""
    tensors: dict[int, list[Tensor]] = {}
    last: dict[int, int] = {}
    for index, call in enumerate(calls):
        for tensor in _looked_at(call.kernel):
            memory = tensor.untyped_storage()._cdata
            tensors.setdefault(memory, []).append(tensor)
            last[memory] = index
    ending: dict[int, list[torch.UntypedStorage]] = {}
    free: list[torch.UntypedStorage] = []
    for index, call in enumerate(calls):
        free += ending.pop(index - 1, [])
        for made in call.made:
            old = made.untyped_storage()
            if old._cdata in kept or old._cdata not in tensors:
                continue
            fits = [block for block in free if block.nbytes() >= old.nbytes()]
            block = min(fits, key=torch.UntypedStorage.nbytes, default=old)
            if block is not old:
                free.remove(block)
                for tensor in tensors.pop(old._cdata):
                    tensor.set_(block, tensor.storage_offset(), tensor.shape, tensor.stride())
            ending.setdefault(last[old._cdata], []).append(block)


def _tensors(found: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _memory(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _written(func: _Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes to."""
    arguments = func._schema.arguments
    given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    return _tensors(
        [given.get(argument.name) for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    )


def _copy(made: list[Tensor], new: list[Tensor]) -> None:
    for tensor, other in zip(made, new, strict=True):
        tensor.copy_(other)


def _again(function: Callable[..., object], args: Sequence[Any], kwargs: dict[str, Any], made: list[Tensor]) -> None:
    _copy(made, _tensors(function(*args, **kwargs)))


def _again_one(call: Callable[[], Tensor], made: Tensor) -> None:
    made.copy_(call())


_SHORTEST: dict[Hashable, tuple[int, bool]] = {}
"""For each kind of call the place of the shortest among its candidates, and whether it takes a place for the result."""


def _into(func: _Operator, args: Sequence[Any], kwargs: dict[str, Any], made: list[Tensor]) -> Callable[[], object]:
    """Return the shortest call that makes the same, and that leaves it in the same tensors.

    It was seen to make the same numbers, once for each kind of call: operator, plain arguments, dtypes, dimensions.
    """
    if len(made) != 1:
        return partial(_again, func, args, kwargs, made)
    calls = list(_shorter(func, args, kwargs))
    kind = func, *map(_plainly, tree_leaves((args, kwargs)))
    if kind not in _SHORTEST:
        _SHORTEST[kind] = _shortest(calls, made[0])
    place, takes_place = _SHORTEST[kind]
    call = calls[place] if place < len(calls) else partial(func, *args, **kwargs)
    return partial(call, out=made[0]) if takes_place else partial(_again_one, call, made[0])


def _plainly(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.dim(), argument.device.type
    return type(argument), argument


def _shortest(calls: list[Callable[..., Any]], made: Tensor) -> tuple[int, bool]:
    """Return the place of the first call that makes this, and whether it can do so in a given place."""
    for takes_place in (True, False):
        for place, call in enumerate(calls):
            if _makes(partial(call, out=torch.empty_like(made)) if takes_place else call, made):
                return place, takes_place
    return len(calls), False


def _shorter(func: _Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Yield calls that may do the same, first those that take less time to be found."""
    name = func._schema.name.removeprefix("aten::")
    if name == "_to_copy":
        yield partial(_converted, args[0])
    if name == "roll" and len(args) == 3 and len(args[1]) == len(args[2]) == 1:
        x, (shift,), (dim,) = args
        kept = x.shape[dim] - shift % x.shape[dim]
        yield partial(torch.cat, (x.narrow(dim, kept, x.shape[dim] - kept), x.narrow(dim, 0, kept)), dim=dim)
    for place in (torch, torch._C._nn):
        function = getattr(place, name, None)
        if isinstance(function, BuiltinFunctionType):  # the operator itself, found by its name
            yield partial(function, *args, **kwargs)
    if "out" in func.overloadpacket.overloads():
        yield partial(func.overloadpacket.out, *args, **kwargs)


def _converted(x: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(x)


def _makes(function: Callable[[], Any], wanted: Tensor) -> bool:
    """Say whether a call makes the same numbers."""
    try:
        found = function()
    except (TypeError, RuntimeError, ValueError):
        return False
    alike = isinstance(found, Tensor) and (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    return alike and torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)
