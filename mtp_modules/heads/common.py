"""Code that several kinds of heads share."""

from collections.abc import Callable

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.layers.last_hidden import LastHiddenState


def last_hidden_state(heads: Heads, state: DecodingState) -> LastHiddenState:
    """Return the state as a :class:`LastHiddenState`.

    Args:
        heads: The heads that need it.
        state: The caller's state.

    Raises:
        ValueError: If it is of another type.
    """
    if not isinstance(state, LastHiddenState):
        refuse(heads, f"state must come from these heads' new_state, got {type(state).__name__}.")
    return state


class LastStateHeads(Heads):
    """Base of heads that draft from the trunk's last hidden states only. Horizon 1 is the trunk's hidden state itself.

    Heads with another horizon 1 override ``first``. Heads that keep more than the last state override ``new_state``.
    """

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return ``hidden`` itself."""
        return hidden

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> LastHiddenState:
        """Make an empty state."""
        return LastHiddenState(batch_size, capacity, count=int(for_drafts))

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append the announced chunk, and return the states of horizon 1."""
        last_hidden_state(self, state).append(hidden)
        return self.first(hidden)


def needed_future(heads: Heads, future: Float[Tensor, "B P K E"] | None) -> Float[Tensor, "B P K E"]:
    """Return ``future``, the embeddings of the next tokens, after checking that the caller has passed it.

    Args:
        heads: The heads that need it.
        future: The caller's argument.

    Raises:
        ValueError: If it is missing.
    """
    if future is None:
        refuse(heads, "future is missing; pass the embeddings of the next tokens (MTPModel does).")
    return future


def needed_features(heads: Heads, features: tuple[Float[Tensor, "B T D"], ...] | None) -> tuple[Tensor, ...]:
    """Return ``features``, the states of inner layers, after checking that the caller has passed as many as are read.

    Args:
        heads: The heads that need them.
        features: The caller's argument.

    Raises:
        ValueError: If they are missing, or more or fewer than ``num_features``.
    """
    if features is None or len(features) != heads.num_features:
        given = "none" if not features else str(len(features))
        refuse(heads, f"features must hold {heads.num_features} inner layers' states, got {given}; pass the trunk's.")
    return features


def picked_rows(
    positions: Int[Tensor, "B P"], seen: Bool[Tensor, "B T T"] | None, length: int
) -> Bool[Tensor, "B 1 P T"]:
    """Return the rows of the attention mask for some positions.

    Args:
        positions: Positions of the queries.
        seen: Attention mask of all positions; ``None`` for the causal mask.
        length: Number ``T`` of positions.
    """
    if seen is None:
        return (torch.arange(length, device=positions.device) <= positions[:, :, None])[:, None]
    return at_positions(seen, positions)[:, None]
