"""Base of heads that add something to other heads."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState, Heads, MixtureStates
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

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise what is added."""

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

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B _ K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        **given: Any,
    ) -> tuple[Float[Tensor, "B _ _"], ...]:
        """Return the states of the heads; see :class:`~mtp_modules.core.interfaces.Heads`."""
        states = self.heads(
            hidden, far_hidden=far_hidden, future=future, positions=positions, document_ids=document_ids, **given
        )
        assert not isinstance(states, MixtureStates)
        return tuple(states)

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

    def draft_states(
        self,
        tokens: Int[Tensor, "B N"],
        state: DecodingState,
        *,
        depth: int,
        before: Float[Tensor, "B M W"] | None,
        parents: Int[Tensor, "B N"],
        embed: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "B _ W"]:
        """Return the states of the heads."""
        return self.heads.draft_states(tokens, state, depth=depth, before=before, parents=parents, embed=embed)

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of the heads."""
        return self.heads.flops(length, num_far)
