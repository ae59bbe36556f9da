"""What the host learns of a round: one tensor, brought over once."""

from typing import NamedTuple

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Array, Float, Int, Tensor


class Told(NamedTuple):
    """What the host knows of a round.

    Attributes:
        tokens: Of each row, of which the first ``counts[b]`` hold.
        counts: One more than drafts that hold.
        accepted: How many drafts hold.
        limits: How many drafts counted.
    """

    tokens: Int[Array, "B C"]
    counts: Int[Array, " B"]
    accepted: Int[Array, " B"]
    limits: Int[Array, " B"]


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


def on_host(told: Int[Tensor, "B M"]) -> Told:
    """Bring it to the host.

    Args:
        told: What :func:`told_of_round` has returned; its memory may be written anew afterwards.

    Raises:
        ValueError: If the model's logits were not numbers.
    """
    numbers = told.cpu().numpy().copy()
    if not numbers[0, -1]:
        refuse("generate", "the model's logits are not numbers (NaN); check its weights and its precision.")
    numbers.setflags(write=False)
    accepted = numbers[:, -3]
    return Told(numbers[:, :-3], accepted + 1, accepted, numbers[:, -2])
