"""What the host learns of a round: one tensor, brought over once."""

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Int, Tensor


def told_of_round(
    tokens: Int[Tensor, "B C"], accepted: Int[Tensor, " B"], limits: Int[Tensor, " B"], logits: Float[Tensor, "B _ V"]
) -> Int[Tensor, "B M"]:
    """Return all that the host must know of a round in one tensor: new tokens, and three numbers a row, ``M = C + 3``.

    Args:
        tokens: Of which those count that are accepted, and one more.
        accepted: How many drafts hold.
        limits: How many drafts counted.
        logits: What it was decided by; the last number says whether it is free of NaN.
    """
    sound = torch.isnan(logits).any().logical_not().long().expand_as(accepted)
    return torch.cat((tokens, accepted[:, None], limits[:, None], sound[:, None]), dim=1)


def on_host(told: Int[Tensor, "B M"]) -> tuple[list[list[int]], list[int], list[int]]:
    """Bring it to the host: tokens, how many drafts hold, and how many counted, of each row.

    Args:
        told: What :func:`told_of_round` has returned.

    Raises:
        ValueError: If the model's logits were not numbers.
    """
    rows: list[list[int]] = told.tolist()
    if not all([row.pop() for row in rows]):
        refuse("generate", "the model's logits are not numbers (NaN); check its weights and its precision.")
    limits, accepted = [row.pop() for row in rows], [row.pop() for row in rows]
    return rows, accepted, limits
