"""A model whose decoding steps are compiled."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from mtp_modules.core.checks import at_least, is_distributed, refuse
from mtp_modules.core.interfaces import DecodingState, Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.acceptance import greedy_round
from mtp_modules.decoders.generation import DecodableModel

FAST = {"cpp_wrapper": True}
"""Options of inductor that spare each call of a graph its way through Python."""


def compile_for_decoding(
    model: DecodableModel,
    *,
    batch_sizes: Collection[int] = (1,),
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> "CompiledModel":
    """Return the model for decoders with its rounds compiled; the output is the same, up to rounding.

    A round of greedy decoding, drafts and all, becomes one graph. Otherwise reading and scoring a chunk does, while
    drafts are made step by step. Prompts and batches of other sizes go through the model as it is. Each number of
    drafts is compiled when it is first used, which takes up to a minute.

    Args:
        model: Not changed. The result shares its weights, and follows them when they change in place.
        batch_sizes: Numbers of rows to compile for; a batch gets smaller as rows end.
        backend: Of ``torch.compile``.
        options: Of the backend; for inductor, :data:`FAST` if ``None``.

    Raises:
        ValueError: If a batch size is below 1, the trunk or the heads cannot be compiled, or the model is shared out
            over several processes.
    """
    for size in batch_sizes:
        at_least("compile_for_decoding", "batch_sizes", size, 1)
    for part, base in ((model.trunk, Trunk), (model.heads, Heads)):
        if type(part).read is base.read:
            refuse(part, "has no read(...), so it cannot be compiled for decoding; decode with the model itself.")
    if is_distributed(model.unembedding.weight):
        refuse("compile_for_decoding", "the model is shared out over several processes; decode with the model itself.")
    if options is None and backend == "inductor":
        options = FAST
    return CompiledModel(model, batch_sizes=batch_sizes, backend=backend, options=options)


class CompiledModel:
    """A model for decoders whose rounds run as compiled graphs; made by :func:`compile_for_decoding`.

    It shares the weights of the model that it was made from, and follows them when they change.

    Args:
        model: Trunk, heads and unembedding.
        batch_sizes: Numbers of rows that graphs are used for.
        backend: Of ``torch.compile``.
        options: Of the backend.
    """

    def __init__(
        self, model: DecodableModel, *, batch_sizes: Collection[int], backend: str, options: Mapping[str, Any] | None
    ) -> None:
        self.trunk, self.heads, self.unembedding = model.trunk, model.heads, model.unembedding
        self.batch_sizes = frozenset(batch_sizes)
        compiler: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        compiler |= {"recompile_limit": 1000, "isolate_recompiles": True}  # one for each chunk of each batch size
        compiler["options"] = None if options is None else dict(options)
        self._read = torch.compile(self._reading, **compiler)
        self._round = torch.compile(self._greedy, **compiler)

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
        logits: Tensor = self._read(chunk, trunk_state, heads_state)
        return logits

    def round(
        self,
        token: Int[Tensor, " B"],
        limits: Int[Tensor, " B"],
        num_drafts: int,
        trunk_state: DecodingState,
        heads_state: DecodingState,
    ) -> tuple[Int[Tensor, "B C"], Int[Tensor, " B"], Float[Tensor, "B C V"]]:
        """Draft greedily with the heads, and verify: a whole round of greedy decoding.

        Args:
            token: The token that each row emitted last.
            limits: How many drafts of each row count.
            num_drafts: How many to make.
            trunk_state: Committed.
            heads_state: Committed.

        Returns:
            New tokens, how many of them were drafts, and the logits.
        """
        heads_state.settle()
        self._announce(1 + num_drafts, trunk_state, heads_state)
        found: tuple[Tensor, Tensor, Tensor] = self._round(token, limits, num_drafts, trunk_state, heads_state)
        return found

    @staticmethod
    def _announce(chunk: int, *states: DecodingState) -> None:
        for state in states:
            state.begin(chunk)
            for tensor, axis in state.growing:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def _reading(self, chunk: Tensor, trunk_state: DecodingState, heads_state: DecodingState) -> Tensor:
        output = self.trunk.read(chunk, trunk_state)
        given = self.heads.features_of(output)
        first = self.heads.read(output.hidden, heads_state, tokens=chunk, embed=self.trunk.embedding, **given)
        return self.unembedding.logits(first)

    def _greedy(
        self,
        token: Tensor,
        limits: Tensor,
        num_drafts: int,
        trunk_state: DecodingState,
        heads_state: DecodingState,
    ) -> tuple[Tensor, Tensor, Tensor]:
        drafts = token[:, None][:, :0]
        if num_drafts:
            embed, unembed = self.trunk.embedding, self.unembedding.logits
            drafts = self.heads.draft(token, heads_state, num_drafts=num_drafts, embed=embed, unembed=unembed).tokens
        logits = self._reading(torch.cat((token[:, None], drafts), dim=1), trunk_state, heads_state)
        return *greedy_round(drafts, limits, logits), logits
