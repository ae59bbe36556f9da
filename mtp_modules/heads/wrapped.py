"""Base of heads that add something to other heads."""

from collections.abc import Callable
from typing import Any

from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor


class WrappedHeads(Heads):
    """Base of heads that add something to other heads, and are those heads in all other respects.

    Args:
        heads: What to add to.

    Raises:
        ValueError: If their drafts are not predicted from one state each.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        if heads.states_scored > len(heads.horizons) - 1:
            refuse(
                self,
                f"heads must have one state per horizon, but {type(heads).__name__} have a mixture of "
                f"{heads.states_scored // (len(heads.horizons) - 1)}; use them as they are.",
            )
        self.heads, self.d_model, self.num_features = heads, heads.d_model, heads.num_features
        self.reads_future, self.reads_every_token = heads.reads_future, heads.reads_every_token
        self.reads_token_ids, self.transition_rank = heads.reads_token_ids, heads.transition_rank
        self.predicts_acceptance = heads.predicts_acceptance
        for name in ("embedding_width", "max_positions", "vocab_size"):
            if hasattr(heads, name):
                setattr(self, name, getattr(heads, name))

    @property
    def horizons(self) -> tuple[int, ...]:
        """Those of the heads."""
        return self.heads.horizons

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Those of the heads."""
        return self.heads.blocks

    @property
    def states_scored(self) -> int:
        """As many as the heads have."""
        return self.heads.states_scored

    @property
    def max_drafts(self) -> int | None:
        """As many as the heads can draft."""
        return self.heads.max_drafts

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return horizon 1's states of the heads."""
        return self.heads.first(hidden, document_ids=document_ids)

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> DecodingState:
        """Make an empty state of the heads."""
        return self.heads.new_state(batch_size, capacity, for_drafts=for_drafts)

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        **given: Any,
    ) -> Float[Tensor, "B T D"]:
        """Let the heads append the announced chunk."""
        return self.heads.read(hidden, state, tokens=tokens, embed=embed, **given)

    def extend(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        **given: Any,
    ) -> Float[Tensor, "B T D"]:
        """Let the heads append a chunk."""
        return self.heads.extend(hidden, state, tokens=tokens, embed=embed, **given)
