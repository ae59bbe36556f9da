"""What kinds of heads share."""

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Bool, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.layers.last_hidden import LastHiddenState


def last_hidden_state(heads: Heads, state: DecodingState) -> LastHiddenState:
    """Return the state as what these heads made.

    Args:
        heads: Whose state it must be.
        state: What the caller passed.

    Raises:
        ValueError: If it is of another kind.
    """
    if not isinstance(state, LastHiddenState):
        refuse(heads, f"state must come from these heads' new_state, got {type(state).__name__}.")
    return state


def picked_rows(
    positions: Int[Tensor, "B P"], seen: Bool[Tensor, "B T T"] | None, length: int
) -> Bool[Tensor, "B 1 P T"]:
    """Return what some positions may look at.

    Args:
        positions: Which.
        seen: What every position may look at; ``None`` for all before it.
        length: Number ``T`` of positions.
    """
    if seen is None:
        return (torch.arange(length, device=positions.device) <= positions[:, :, None])[:, None]
    return at_positions(seen, positions)[:, None]
