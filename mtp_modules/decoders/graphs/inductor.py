"""All that decoding asks of torch's private parts, each with its reason and what happens without it.

Every part may go with a new version of torch. What is missing is left out: rounds are then slower, never wrong.
Tried with torch 2.13.

====================================  ==================================================  ==============================
private part                          reason                                              without it
====================================  ==================================================  ==============================
``guard_filter_fn``                   guards on the model are checked once a run          checked before every round
``recompile_limit``,                  a graph for each chunk of each batch size;          torch's own limit; beyond it,
``isolate_recompiles``                two models must not share a limit                   rounds run operation by
                                                                                          operation
``_dynamo.maybe_mark_dynamic``        one graph serves texts of all lengths               torch finds out by compiling
                                                                                          twice
``_dynamo.mark_static_address``       CUDA graphs write the KV cache in place             no CUDA graphs
``_dynamo.config.prepare_freezing``   weights become constants of graphs                  weights are inputs
``GraphLowering.add_tensor_constant``  equal constants of all graphs are kept once        one copy a matrix product
``cpp_builder.is_gcc``, compiler flag  GCC keeps sums in registers and fetches weights    GCC's own choices
in ``cpp.enable_floating_point_...``  ahead
options of inductor                   no Python between calls; fastest products by trial  unknown options are left out
====================================  ==================================================  ==============================
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any
from weakref import ref

import torch

from mtp_modules.core.shapes import Tensor

FAST = {"cpp_wrapper": True}
"""Options of inductor that spare each call of a graph its way through Python."""

_QUIET = {"max_autotune_report_choices_stats": False, "autotune_num_choices_displayed": 0}
FROZEN = {**FAST, **_QUIET, "freezing": True, "max_autotune": True}
"""Options of inductor for weights that are constants: laid out for the products they go into, the fastest of which are
found by trying.
"""

_KEPT_IN_REGISTERS = "-fno-tree-loop-distribute-patterns --param max-completely-peel-times=64"
"""For GCC, which otherwise clears the 16 and more vectors that a product of six or more rows is summed in by a call of
``memset`` or in a loop, and from then on writes all of them to memory at every step.
"""
_FETCHED_AHEAD = (
    "-fprefetch-loop-arrays --param prefetch-latency=1000 --param simultaneous-prefetches=100 "
    "--param prefetch-min-insn-to-mem-ratio=1 --param min-insn-to-prefetch-ratio=1"
)
"""For GCC, so that products ask for weights some kilobytes before they need them. A processor's own prefetching is
late as soon as there is more than one row to compute, and then further rows are not free.
"""
_ROUNDING = "cpp.enable_floating_point_contract_flag"
"""The only flag of the compiler that an option of inductor gives; what stands behind it goes along."""

_KEPT: ContextVar["SharedConstants | None"] = ContextVar("_KEPT", default=None)


def inductor_options(device: torch.device, *, freeze: bool, many_positions: bool = False) -> dict[str, Any]:
    """Return the options that inductor gets where none are given; with ``many_positions``, for prompts."""
    if device.type == "cuda":
        graphs = {"triton.cudagraphs": True} if can_mark_static_addresses() else {}
        return _known({**graphs, **_QUIET, "freezing": True, "max_autotune": True} if freeze else graphs)
    if not freeze or device.type != "cpu":
        return _known(FROZEN if freeze else FAST)
    if many_positions:
        return _known({**FROZEN, "max_autotune_gemm_backends": "ATEN,CPP"})
    # Products of a library look better than they are when they are tried alone, again and again, on one small matrix.
    return with_flags(_known({**FROZEN, "max_autotune_gemm_backends": "CPP"}), f"{_KEPT_IN_REGISTERS} {_FETCHED_AHEAD}")


def options_for_noise(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of inductor for random numbers: their products wrap around, which C++ leaves undefined.

    For them alone, for what GCC is told with that makes products of several rows a tenth slower.
    """
    return with_flags(options, "-fwrapv")


def with_flags(options: Mapping[str, Any], flags: str) -> dict[str, Any]:
    """Return options of inductor with flags for the compiler of C++, if that is GCC."""
    from torch._inductor import config, cpp_builder  # takes a second, so only where it is in use

    rounding = getattr(getattr(config, "cpp", None), "enable_floating_point_contract_flag", None)
    if rounding is None or not getattr(cpp_builder, "is_gcc", lambda: False)():
        return {**options}
    return {**options, _ROUNDING: f"{options.get(_ROUNDING, rounding)} {flags}"}


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options that this version of inductor has."""
    from torch._inductor import config

    def has(name: str) -> bool:
        place: Any = config
        for part in name.split("."):
            if not hasattr(place, part):
                return False
            place = getattr(place, part)
        return True

    return {name: value for name, value in options.items() if has(name)}


def compiled(function: Callable[..., Tensor], *, backend: Any, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Compile a function of tensors and states into one graph for each size."""
    usual: dict[str, Any] = {"backend": backend, "dynamic": False if hasattr(_dynamo(), "maybe_mark_dynamic") else None}
    # A graph for each chunk of each batch size, and as many as it takes.
    unlimited: dict[str, Any] = {"fullgraph": True, "recompile_limit": 1000, "isolate_recompiles": True}
    filtered = {**options, "guard_filter_fn": _of_the_round}
    attempts: list[tuple[dict[str, Any], Mapping[str, Any]]] = [
        (unlimited, filtered),
        (unlimited, options),
        ({}, filtered),
    ]
    for arguments, kept in attempts:
        try:
            return torch.compile(function, **usual, **arguments, options={**kept} or None)
        except (TypeError, RuntimeError):  # this version lacks one of them
            continue
    return torch.compile(function, **usual, options={**options} or None)


def _of_the_round(guards: Sequence[Any]) -> list[bool]:
    """Say which of the compiler's checks before every round are kept: not those of the model and of the code.

    :meth:`~mtp_modules.decoders.graphs.compiled.CompiledModel.check` checks the model once a run instead.
    """
    return [
        re.search(r"\bself\b", guard.name) is None
        and not guard.is_global
        and guard.guard_type != "NOT_PRESENT_IN_GENERIC_DICT"
        for guard in guards
    ]


def _dynamo() -> Any:
    return torch._dynamo


def mark_dynamic(tensor: Tensor, axis: int) -> None:
    """Announce that the length of a tensor differs from round to round."""
    mark = getattr(_dynamo(), "maybe_mark_dynamic", None)
    if mark is not None:
        mark(tensor, axis)


def can_mark_static_addresses() -> bool:
    """Whether the address of a tensor can be marked as static, without which CUDA graphs do not pay."""
    return hasattr(_dynamo(), "mark_static_address")


def mark_static_address(tensor: Tensor) -> None:
    """Announce that a tensor stays where it is, so that CUDA graphs may write it in place."""
    if can_mark_static_addresses():
        _dynamo().mark_static_address(tensor)


def begin_step() -> None:
    """Tell CUDA graphs that what the last round returned is no longer needed."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def weights_as_constants() -> AbstractContextManager[object] | None:
    """Return a context in which graphs are compiled with weights as constants; ``None`` if this version has none."""
    config = getattr(_dynamo(), "config", None)
    if not hasattr(config, "prepare_freezing"):
        return None
    patched: AbstractContextManager[object] = torch._dynamo.config.patch(prepare_freezing=True)
    return patched


class SharedConstants:
    """Constants of graphs, each kept once: a new graph takes those that are there already.

    Inductor lays a weight out anew for each matrix product that it goes into. Heads that take the same step for one
    draft after the other would read other memory for each, and none of it would still be in the processor's cache.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[ref[Tensor]]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let graphs that this thread compiles meanwhile keep their constants here."""
        _share_constants()
        token = _KEPT.set(self)
        try:
            yield
        finally:
            _KEPT.reset(token)

    def known(self, constant: Tensor) -> Tensor:
        """Return the constant of an earlier graph that is the same to the bit, or else this one."""
        if constant.layout != torch.strided or constant.dim() == 0 or not constant.is_contiguous():
            return constant
        kind = constant.shape, constant.dtype, constant.device
        alive = [found for weak in self._known.get(kind, ()) if (found := weak()) is not None]
        for found in alive:
            if torch.equal(found.view(torch.uint8), constant.view(torch.uint8)):
                return found
        self._known[kind] = [ref(found) for found in (*alive, constant)]
        return constant


@cache
def _share_constants() -> None:
    """Let inductor ask for constants that are known, from now on."""
    try:
        from torch._inductor.graph import GraphLowering  # takes a second, so only where it is in use
        from torch.utils._python_dispatch import _disable_current_modes

        theirs = GraphLowering.add_tensor_constant
    except (ImportError, AttributeError):
        return

    def ours(graph: GraphLowering, data: Tensor, *others: Any, **named: Any) -> Any:
        kept = _KEPT.get()
        if kept is not None:
            with _disable_current_modes():  # the numbers count, not the shapes that compilers go by
                data = kept.known(data)
        return theirs(graph, data, *others, **named)

    GraphLowering.add_tensor_constant = ours  # type: ignore[method-assign, assignment]
