"""Checks that every kind of heads makes before it drafts."""

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState, Draft, DraftChoice, Heads
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.layers.cache import LastHiddenState


def check_num_drafts(heads: Heads, num_drafts: int) -> None:
    """Refuse to draft nothing, or more than the heads can.

    Args:
        heads: Who drafts.
        num_drafts: How many tokens are asked for.

    Raises:
        ValueError: If the number lies outside 1 .. ``max_drafts``.
    """
    most = heads.max_drafts
    if num_drafts < 1:
        refuse(heads, f"num_drafts must be at least 1, got {num_drafts}.")
    if most is not None and num_drafts > most:
        refuse(heads, f"num_drafts must lie in 1..{most} for {len(heads.horizons)} horizons, got {num_drafts}.")


def choose_all(logits: Float[Tensor, "B K V"], choose: DraftChoice) -> Draft:
    """Choose drafts from logits that do not depend on one another.

    Args:
        logits: Nearest horizon first.
        choose: Chooses each draft.
    """
    tokens = []
    for depth in logits.unbind(dim=1):
        tokens.append(choose(depth))
        if choose.done:
            break
    return Draft(tokens=torch.stack(tokens, dim=1), logits=logits[:, : len(tokens)])


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
