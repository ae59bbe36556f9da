"""A model whose decoding steps are compiled."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Tensor
from mtp_modules.decoders.generation import DecodableModel
from mtp_modules.decoders.graphs.executor import GraphModel
from mtp_modules.decoders.graphs.inductor import SharedConstants
from mtp_modules.decoders.sampling.noise import gumbels
from mtp_modules.decoders.verification.verifier import Drawing

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
"""For GCC, so that products ask for weights some kilobytes before they are their turn. A processor's own guesses are
late as soon as there is more than one row to compute with what comes, and then further rows are not free.
"""
_ROUNDING = "cpp.enable_floating_point_contract_flag"
"""The only flag of the compiler that an option of inductor gives; what stands behind it goes along."""


def inductor_options(device: torch.device, *, freeze: bool, many_positions: bool = False) -> dict[str, Any]:
    """Return the options that inductor gets where none are given.

    Args:
        device: Where the model is.
        freeze: Whether weights are constants.
        many_positions: Whether computing takes longer than fetching the weights, as it does for prompts.
    """
    if not freeze or device.type != "cpu":
        return FROZEN if freeze else FAST
    if many_positions:
        return {**FROZEN, "max_autotune_gemm_backends": "ATEN,CPP"}
    # Products of a library look better than they are when they are tried alone, again and again, on one small matrix.
    return _with_flags({**FROZEN, "max_autotune_gemm_backends": "CPP"}, f"{_KEPT_IN_REGISTERS} {_FETCHED_AHEAD}")


def _with_flags(options: Mapping[str, Any], flags: str) -> dict[str, Any]:
    """Return options of inductor with flags for the compiler of C++, if that is GCC."""
    from torch._inductor import config, cpp_builder  # takes a second, so only where it is in use

    if not cpp_builder.is_gcc():
        return {**options}
    return {**options, _ROUNDING: f"{options.get(_ROUNDING, config.cpp.enable_floating_point_contract_flag)} {flags}"}


def _wrapping(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of inductor for random numbers: their products wrap around, which C++ leaves undefined.

    For them alone, for what GCC is told with that makes products of several rows a tenth slower.
    """
    return _with_flags(options, "-fwrapv")


def compile_for_decoding(
    model: DecodableModel,
    *,
    batch_sizes: Collection[int] = (1,),
    prompt_sizes: Collection[int] = (),
    freeze: bool = False,
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> "CompiledModel":
    """Return the model for decoders with its rounds compiled; the output is the same, up to rounding.

    A round with no drafts or with drafts of the heads, verification and all, becomes one graph, whether tokens are
    drawn or not. Reading and scoring a chunk does where drafts come from the text alone, form a tree, end by
    confidence, or where laws are kept. Larger batches go through the model as it is, and so do prompts, unless there
    are sizes for them. Each number of drafts is compiled when it is first used, which takes up to a minute.

    Args:
        model: Not changed. The result shares its weights.
        batch_sizes: Numbers of rows to compile for, such as ``(1, 4, 16)``. A batch of fewer is filled up to the next
            of them; a larger one goes through the model as it is, until enough of its rows have ended.
        prompt_sizes: Numbers of positions to compile the reading of prompts for, such as ``(64,)``. A prompt is read by
            as many of them as it takes, the last one filled up; what would not fill more than half of it goes through
            the model as it is, and so do prompts of a batch that is not of one of the ``batch_sizes``.
        freeze: Take the weights for constants. Faster, above all on CPUs, where they are then laid out for the products
            they go into; needs memory for them once more for each layout, and longer to compile. When weights change,
            decoding is refused; without, it follows them as long as they change in place.
        backend: Of ``torch.compile``.
        options: Of the backend; for inductor, those of :func:`inductor_options` if ``None``.

    Raises:
        ValueError: If a size is below 1, the trunk or the heads cannot be compiled, or the model is shared out
            over several processes; when decoding, if the weights are no longer those that were compiled for.
    """
    return CompiledModel(
        model, batch_sizes=batch_sizes, prompt_sizes=prompt_sizes, freeze=freeze, backend=backend, options=options
    )


def _of_the_round(guards: Sequence[Any]) -> list[bool]:
    """Say which of the compiler's checks before every round are kept: not those of the model and of the code.

    :meth:`~mtp_modules.decoders.graphs.executor.GraphModel.check` looks at the model once a run instead.
    """
    return [
        re.search(r"\bself\b", guard.name) is None
        and not guard.is_global
        and guard.guard_type != "NOT_PRESENT_IN_GENERIC_DICT"
        for guard in guards
    ]


class CompiledModel(GraphModel):
    """A model for decoders whose rounds run as compiled graphs; made by :func:`compile_for_decoding`.

    It shares the weights of the model that it was made from.

    Args:
        model: Trunk, heads and unembedding.
        batch_sizes: Numbers of rows that graphs are used for.
        prompt_sizes: How many tokens of prompts are read at once by graphs.
        freeze: Whether weights are constants of the graphs.
        backend: Of ``torch.compile``.
        options: Of the backend; for inductor, those of :func:`inductor_options` if ``None``.
    """

    maker, done = "compile_for_decoding", "compiled"

    def __init__(
        self,
        model: DecodableModel,
        *,
        batch_sizes: Collection[int],
        prompt_sizes: Collection[int],
        freeze: bool,
        backend: str,
        options: Mapping[str, Any] | None,
    ) -> None:
        self.freeze, self.backend, self.options, self._constants = freeze, backend, options, SharedConstants()
        self._device = model.unembedding.weight.device
        super().__init__(model, batch_sizes=batch_sizes, prompt_sizes=prompt_sizes)
        on_cpu = backend == "inductor" and self._device.type == "cpu"
        self._gumbels = self._compiled(gumbels, _wrapping(self._options()) if on_cpu else self._options())

    def _options(self, *, many_positions: bool = False) -> Mapping[str, Any]:
        if self.options is None and self.backend == "inductor":
            return inductor_options(self._device, freeze=self.freeze, many_positions=many_positions)
        return self.options or {}

    def _compiled(self, function: Callable[..., Tensor], options: Mapping[str, Any]) -> Callable[..., Tensor]:
        compiler: dict[str, Any] = {"backend": self.backend, "fullgraph": True, "dynamic": False}
        compiler |= {"recompile_limit": 1000, "isolate_recompiles": True}  # one for each chunk of each batch size
        kept = {**options, "guard_filter_fn": _of_the_round}  # anew, for torch.compile takes the filter out of it
        return torch.compile(function, **compiler, options=kept)

    def _graphs_of(self, function: Callable[..., Tensor], *, many_positions: bool = False) -> Callable[..., Tensor]:
        graphs = self._compiled(function, self._options(many_positions=many_positions))
        if not self.freeze:
            return graphs
        constants = torch._dynamo.config.patch(prepare_freezing=True)

        def call(*inputs: object) -> Tensor:
            with constants, self._constants.used():
                return graphs(*inputs)

        return call

    @property
    def gumbels(self) -> Callable[..., Tensor]:
        """What :func:`mtp_modules.decoders.sampling.noise.gumbels` is, as a graph."""
        return self._gumbels

    def _prepare(self, drawing: Drawing) -> None:
        drawing.acceptance.prepare(drawing.noise)

    def _announce(self, chunk: int, *states: DecodingState) -> None:
        super()._announce(chunk, *states)
        for state in states:
            for tensor, axis in state.growing():
                torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def _version(self, weight: Tensor) -> tuple[object, ...]:
        if not self.freeze:
            return ()
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version

    def _refuse_weights(self, name: str) -> None:
        how = "changed" if self.freeze else "another shape, dtype, device or mode"
        refuse(
            "compile_for_decoding",
            f"{name} has {how} since the model was compiled; call compile_for_decoding(model) again"
            + (", or leave freeze out while weights change." if self.freeze else "."),
        )
