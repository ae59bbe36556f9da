"""Checks that every kind of heads makes before it drafts."""

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.layers.cache import LastHiddenState


def check_num_drafts(heads: Heads, num_drafts: int) -> None:
    """Refuse to draft nothing, or more than the heads can.

    Args:
        heads: Who drafts.
        num_drafts: How many tokens are asked for.

    Raises:
        ValueError: If the number lies outside 1 .. ``max_drafts``.
    """
    if not 1 <= num_drafts <= heads.max_drafts:
        refuse(
            heads, f"num_drafts must lie in 1..{heads.max_drafts} for {len(heads.horizons)} horizons, got {num_drafts}."
        )


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
