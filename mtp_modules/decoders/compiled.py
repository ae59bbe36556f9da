"""A model whose decoding steps are compiled."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from mtp_modules.core.checks import at_least, is_distributed, refuse
from mtp_modules.core.interfaces import DecodingState, Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.acceptance import greedy_round
from mtp_modules.decoders.draft_policy import DepthChooser
from mtp_modules.decoders.drafting import DraftChoice, Found, heads_draft
from mtp_modules.decoders.drawing import Drawing
from mtp_modules.decoders.generation import DecodableModel
from mtp_modules.decoders.noise import gumbels
from mtp_modules.decoders.transfer import told_of_round

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
_ROUNDING = "cpp.enable_floating_point_contract_flag"
"""The only flag of the compiler that an option of inductor gives; what stands behind it goes along."""


def inductor_options(device: torch.device, *, freeze: bool) -> dict[str, Any]:
    """Return the options that inductor gets where none are given.

    Args:
        device: Where the model is.
        freeze: Whether weights are constants.
    """
    if not freeze or device.type != "cpu":
        return FROZEN if freeze else FAST
    # Products of a library look better than they are when they are tried alone, again and again, on one small matrix.
    return _with_flags({**FROZEN, "max_autotune_gemm_backends": "CPP"}, _KEPT_IN_REGISTERS)


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
    freeze: bool = False,
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> "CompiledModel":
    """Return the model for decoders with its rounds compiled; the output is the same, up to rounding.

    A round with no drafts or with drafts of the heads, verification and all, becomes one graph, whether tokens are
    drawn or not. Reading and scoring a chunk does where drafts come from the text alone, form a tree, end by
    confidence, or where laws are kept. Prompts and larger batches go through the model as it is. Each number of drafts
    is compiled when it is first used, which takes up to a minute.

    Args:
        model: Not changed. The result shares its weights.
        batch_sizes: Numbers of rows to compile for, such as ``(1, 4, 16)``. A batch of fewer is filled up to the next
            of them; a larger one goes through the model as it is, until enough of its rows have ended.
        freeze: Take the weights for constants. Faster, above all on CPUs, where they are then laid out for the products
            they go into; needs memory for them once more for each graph, and longer to compile. When weights change,
            decoding is refused; without, it follows them as long as they change in place.
        backend: Of ``torch.compile``.
        options: Of the backend; for inductor, those of :func:`inductor_options` if ``None``.

    Raises:
        ValueError: If a batch size is below 1, the trunk or the heads cannot be compiled, or the model is shared out
            over several processes; when decoding, if the weights are no longer those that were compiled for.
    """
    for size in batch_sizes:
        at_least("compile_for_decoding", "batch_sizes", size, 1)
    for part, base in ((model.trunk, Trunk), (model.heads, Heads)):
        if type(part).read is base.read:
            refuse(part, "has no read(...), so it cannot be compiled for decoding; decode with the model itself.")
    if is_distributed(model.unembedding.weight):
        refuse("compile_for_decoding", "the model is shared out over several processes; decode with the model itself.")
    if options is None and backend == "inductor":
        options = inductor_options(model.unembedding.weight.device, freeze=freeze)
    return CompiledModel(model, batch_sizes=batch_sizes, freeze=freeze, backend=backend, options=options or {})


def _of_the_round(guards: Sequence[Any]) -> list[bool]:
    """Say which of the compiler's checks before every round are kept: not those of the model and of the code.

    :meth:`CompiledModel.check` looks at the model once a run instead.
    """
    return [
        re.search(r"\bself\b", guard.name) is None
        and not guard.is_global
        and guard.guard_type != "NOT_PRESENT_IN_GENERIC_DICT"
        for guard in guards
    ]


class CompiledModel:
    """A model for decoders whose rounds run as compiled graphs; made by :func:`compile_for_decoding`.

    It shares the weights of the model that it was made from.

    Args:
        model: Trunk, heads and unembedding.
        batch_sizes: Numbers of rows that graphs are used for.
        freeze: Whether weights are constants of the graphs.
        backend: Of ``torch.compile``.
        options: Of the backend.

    Attributes:
        gumbels: What :func:`mtp_modules.decoders.noise.gumbels` is, as a graph.
    """

    def __init__(
        self,
        model: DecodableModel,
        *,
        batch_sizes: Collection[int],
        freeze: bool,
        backend: str,
        options: Mapping[str, Any],
    ) -> None:
        self.trunk, self.heads, self.unembedding = model.trunk, model.heads, model.unembedding
        self.batch_sizes, self.freeze = frozenset(batch_sizes), freeze
        compiler: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        compiler |= {"recompile_limit": 1000, "isolate_recompiles": True}  # one for each chunk of each batch size

        def compiled(function: Callable[..., Tensor], options: Mapping[str, Any] = options) -> Callable[..., Tensor]:
            kept = {**options, "guard_filter_fn": _of_the_round}  # anew, for torch.compile takes the filter out of it
            return torch.compile(function, **compiler, options=kept)

        self._read, self._round = compiled(self._reading), compiled(self._whole)
        on_cpu = backend == "inductor" and self.unembedding.weight.device.type == "cpu"
        self.gumbels = compiled(gumbels, _wrapping(options) if on_cpu else options)
        self._constants = torch._dynamo.config.patch(prepare_freezing=True) if freeze else nullcontext()
        self._compiled_for = self._weights()

    def check(self) -> None:
        """Refuse to decode with weights that are not those of the graphs.

        Raises:
            ValueError: If they have changed.
        """
        now = self._weights()
        for name, found in now.items():
            if self._compiled_for.get(name) != found:
                how = "changed" if self.freeze else "another shape, dtype, device or mode"
                refuse(
                    "compile_for_decoding",
                    f"{name} has {how} since the model was compiled; call compile_for_decoding(model) again"
                    + (", or leave freeze out while weights change." if self.freeze else "."),
                )

    def _weights(self) -> dict[str, tuple[object, ...]]:
        """Return what graphs rely on, of every part and weight."""
        found: dict[str, tuple[object, ...]] = {}
        for name in ("trunk", "heads", "unembedding"):
            part: nn.Module = getattr(self, name)
            found[name] = tuple(module.training for module in part.modules())
            for key, weight in (*part.named_parameters(), *part.named_buffers()):
                version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version) if self.freeze else ()
                found[f"{name}.{key}"] = weight.shape, weight.stride(), weight.dtype, weight.device, *version
        return found

    def size_for(self, rows: int) -> int:
        """Return the smallest batch that there are graphs for and that holds so many rows; just those if there is none.

        Args:
            rows: How many.
        """
        return min((size for size in self.batch_sizes if size >= rows), default=rows)

    def read(
        self, chunk: Int[Tensor, "B C"], trunk_state: DecodingState, heads_state: DecodingState
    ) -> Float[Tensor, "B C V"]:
        """Append a chunk to both states, and return horizon 1's logits.

        Args:
            chunk: Tokens.
            trunk_state: Committed.
            heads_state: Committed.
        """
        self._announce(chunk.shape[1], trunk_state, heads_state)
        with self._constants:
            logits: Tensor = self._read(chunk, trunk_state, heads_state)
        return logits

    def round(
        self,
        token: Int[Tensor, " B"],
        limits: Int[Tensor, " B"],
        num_drafts: int,
        trunk_state: DecodingState,
        heads_state: DecodingState,
        found: Found | None = None,
        drawing: Drawing | None = None,
    ) -> Int[Tensor, "B M"]:
        """Draft with the heads, and verify: a whole round.

        Args:
            token: The token that each row emitted last.
            limits: How many drafts of each row count.
            num_drafts: How many to make.
            trunk_state: Committed.
            heads_state: Committed.
            found: Drafts that go before those of the heads.
            drawing: What drafts and tokens are drawn with; ``None`` chooses the likeliest.

        Returns:
            What :func:`~mtp_modules.decoders.transfer.told_of_round` says.
        """
        heads_state.settle()
        if drawing is not None:
            drawing.acceptance.prepare(drawing.noise)
        self._announce(1 + num_drafts, trunk_state, heads_state)
        with self._constants:
            told: Tensor = self._round(token, limits, num_drafts, trunk_state, heads_state, found, drawing)
        return told

    @staticmethod
    def _announce(chunk: int, *states: DecodingState) -> None:
        for state in states:
            state.begin(chunk)
            for tensor, axis in state.growing():
                torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def _reading(self, chunk: Tensor, trunk_state: DecodingState, heads_state: DecodingState) -> Tensor:
        output = self.trunk.read(chunk, trunk_state)
        given = self.heads.features_of(output)
        first = self.heads.read(output.hidden, heads_state, tokens=chunk, embed=self.trunk.embedding, **given)
        return self.unembedding.logits(first)

    def _whole(
        self,
        token: Tensor,
        limits: Tensor,
        num_drafts: int,
        trunk_state: DecodingState,
        heads_state: DecodingState,
        found: Found | None,
        drawing: Drawing | None,
    ) -> Tensor:
        drafts, source = token[:, None][:, :0], None
        if num_drafts:
            choice = DraftChoice(limits, drawing, DepthChooser(num_drafts))
            heads_draft(self.heads, heads_state, token, self.trunk.embedding, self.unembedding.logits)(
                choice, num_drafts
            )
            drafts, source, limits = choice.proposal()
            if found is not None:
                drafts, limits, source = found.instead_of(drafts, limits, source)
        logits = self._reading(torch.cat((token[:, None], drafts), dim=1), trunk_state, heads_state)
        if drawing is None:
            tokens, accepted = greedy_round(drafts, limits, logits)
        else:
            tokens, accepted, _ = drawing.verify(drafts, source, limits, logits)
        return told_of_round(tokens, accepted, limits, logits)
