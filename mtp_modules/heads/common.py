"""What kinds of heads share."""

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.layers.cache import LastHiddenState


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
