"""Drafts: how they are sampled, and trees of them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from mtp_modules.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Draft:
    """Tokens that are proposed after the token emitted last.

    Attributes:
        tokens: ``(B, K)``, nearest first; in a tree, parents before their children.
        logits: ``(B, K, V)``, what they were chosen from; ``None`` where no head drafted them.
        probs: ``(B, K, V)``, the distributions ``q`` that they were sampled from, the very tensors, float64; a one-hot
            row where a token was not sampled; ``None`` in greedy decoding.
        counts: ``(B,)``, how many of each row's tokens count, the others are padding; ``None`` if all do.
        parents: ``(B, K)``, in a tree: which token comes before each, 0 for the token emitted last, ``i`` for the
            ``i``-th of ``tokens``; ``None`` for a chain.
        depth: In a tree, most tokens one after the other.
    """

    tokens: Int[Tensor, "B K"]
    logits: Float[Tensor, "B K V"] | None = None
    probs: Float[Tensor, "B K V"] | None = None
    counts: Int[Tensor, " B"] | None = None
    parents: Int[Tensor, "B K"] | None = None
    depth: int = 0


@runtime_checkable
class DraftSampler(Protocol):
    """Samples drafts from a head's logits, one after the other.

    Attributes:
        done: Whether no row wants another draft; drafting then ends early.
    """

    done: bool

    def __call__(self, logits: Float[Tensor, "B V"]) -> tuple[Int[Tensor, " B"], Float[Tensor, "B V"] | None]:
        """Return the next draft of every row, and the distributions that they were sampled from, if they were."""


class GreedySampler:
    """Draft the token with the largest logit."""

    done = False

    def __call__(self, logits: Float[Tensor, "B V"]) -> tuple[Int[Tensor, " B"], None]:
        """Return the argmax of every row."""
        return logits.argmax(dim=-1), None


def one_hot(tokens: Int[Tensor, "*N"], size: int) -> Int[Tensor, "*N V"]:
    """Return 1 at the index of each token and 0 elsewhere, without the synchronisation with the CPU that torch's has.

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
