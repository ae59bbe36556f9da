"""Drafts: how they are chosen, and trees of them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from mtp_modules.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Draft:
    """Tokens that heads propose after the token that was emitted last.

    Attributes:
        tokens: ``(B, K)``, nearest horizon first.
        logits: ``(B, K, V)``, what they were chosen from.
    """

    tokens: Int[Tensor, "B K"]
    logits: Float[Tensor, "B K V"]


@runtime_checkable
class DraftChoice(Protocol):
    """Chooses drafts from logits, one after the other.

    Attributes:
        done: Whether no row wants another draft; drafting then ends early.
    """

    done: bool

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        """Return the next draft of every row."""


class LikeliestToken:
    """Draft the token with the largest logit."""

    done = False

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        """Return the next draft of every row."""
        return logits.argmax(dim=-1)


def one_hot(tokens: Int[Tensor, "*N"], size: int) -> Int[Tensor, "*N V"]:
    """Return 1 at the place of each token and 0 elsewhere, without a look at the tokens from the host, as torch has it.

    Args:
        tokens: Numbers below ``size``.
        size: Number ``V`` of places.

    Example:
        >>> import torch
        >>> one_hot(torch.tensor([2, 0]), 3).tolist()
        [[0, 0, 1], [1, 0, 0]]
    """
    return (tokens[..., None] == torch.arange(size, device=tokens.device)).long()


def ancestors_of(parents: Int[Tensor, "B C"]) -> Bool[Tensor, "B C C"]:
    """Return for each token of a tree which tokens lie between the root and it, both included.

    Args:
        parents: Place of the token before each token; -1 for the root. A parent comes before its children.
    """
    size = parents.shape[1]
    known = one_hot(parents + 1, size + 1)[:, :, 1:].float()
    known = known + torch.eye(size, device=parents.device)
    reach = 1
    while reach < size:
        known = (known @ known).clamp(max=1)
        reach *= 2
    return known > 0
