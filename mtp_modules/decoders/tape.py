"""The kernels of a function of tensors, recorded once and launched again without the Python between them.

A recording is a straight line: the same kernels, on the same memory, with the same sizes. What differs from one run to
the next has to lie in the tensors that the recorded function reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.decoders.kernels import Operator, copy_into, into, memory_of, tensors_in

_T = TypeVar("_T")

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
        _share_memory(self._calls, memory_of(kept))


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


class _Listener(TorchDispatchMode, ABC):  # type: ignore[no-untyped-call]
    """Hear of every operator, and refuse those that ask the host."""

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if _asks_the_host(func, args):
            _refuse_numbers(func._schema.name)
        return self.call(func, args, {} if kwargs is None else kwargs)

    @abstractmethod
    def call(self, func: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
        """Return what an operator returns."""


class _Watch(_Listener):
    """Refuse tensors that are elsewhere as well: a graph would not compute them again."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def call(self, func: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
        result = func(*args, **kwargs)
        if any(tensor.device.type != self.device.type and tensor.dim() for tensor in tensors_in(result)):
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


class _Tape(_Listener):
    """Write down every kernel that is called.

    The tape keeps all tensors, so that memory is never used twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.constants: dict[int, _Call] = {}
        self.kept: list[Tensor] = []

    def call(self, func: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
        before = len(self.calls)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._note(func, args, kwargs, result)
        elif self._is_longer_in_parts(before, tensors_in((args, kwargs)), tensors_in(result)):
            del self.calls[before:]
            self._note(func, args, kwargs, result)
        return result

    def _is_longer_in_parts(self, before: int, given: list[Tensor], made: list[Tensor]) -> bool:
        """Say whether an operator is better called as a whole than by the kernels it has come down to."""
        parts = [call for call in self.calls[before:] if not call.constant]
        outputs = sum(len(call.made) for call in parts)
        return outputs > len(made) and not memory_of(given) & memory_of(made)

    def _note(self, func: Operator, args: Sequence[Any], kwargs: dict[str, Any], result: object) -> None:
        given, made = tensors_in((args, kwargs)), tensors_in(result)
        self.kept += [*given, *made]
        if func._schema.is_mutable:
            for memory in memory_of(_written(func, args, kwargs)) & self.constants.keys():
                self.constants.pop(memory).constant = False
            kernel = partial(_METHODS.get(func._schema.name, func), *args, **kwargs)
            self.calls.append(_Call(kernel, []))
        elif not memory_of(made) <= memory_of(given):  # otherwise another look at memory
            drawn = torch.Tag.nondeterministic_seeded in func.tags
            if drawn or not memory_of(given) <= self.constants.keys():
                fresh = [tensor for tensor in made if not memory_of([tensor]) <= memory_of(given)]
                self.calls.append(_Call(into(func, args, kwargs, made), fresh))
            else:
                first = [tensor.clone() for tensor in made]
                call = _Call(partial(copy_into, made, first), made, constant=True)
                self.calls.append(call)
                self.constants |= dict.fromkeys(memory_of(made), call)


def _asks_the_host(func: Operator, args: Sequence[Any]) -> bool:
    """Say whether an operator moves numbers between tensors and the host, or must know them to say what it makes."""
    name = func._schema.name
    if name in _BY_INDEX:  # a mask is counted before it is an index
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_in(args[1]))
    return name in _OF_THE_HOST or torch.Tag.dynamic_output_shape in func.tags


def _looked_at(call: object) -> list[Tensor]:
    """Return the tensors that a call reads and writes."""
    if not isinstance(call, partial):
        return tensors_in(call)
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
            looking = tensors.pop(old._cdata, [])  # none if several results lie there, and this is not the first
            if old._cdata in kept or not looking:
                continue
            fits = [block for block in free if block.nbytes() >= old.nbytes()]
            block = min(fits, key=torch.UntypedStorage.nbytes, default=old)
            if block is not old:
                free.remove(block)
                for tensor in looking:
                    tensor.set_(block, tensor.storage_offset(), tensor.shape, tensor.stride())
            ending.setdefault(last[old._cdata], []).append(block)


def _written(func: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes to."""
    arguments = func._schema.arguments
    given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    return tensors_in(
        [given.get(argument.name) for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    )
