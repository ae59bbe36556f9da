"""Drafts: how they are sampled, and trees of them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from mtp_modules.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Draft:
    """Tokens drafted after the last emitted token.

    Attributes:
        tokens: ``(B, K)``, nearest first; in a tree, parents before their children.
        logits: ``(B, K, V)``, the heads' logits for them; ``None`` if no head drafted them.
        probs: ``(B, K, V)``, float64, the distributions ``q`` that the tokens were sampled from, not recomputed; a
            one-hot row where a token was not sampled; ``None`` in greedy decoding.
        counts: ``(B,)``, how many of each row's tokens are drafts, the rest is padding; ``None`` if all are.
        parents: ``(B, K)``, in a tree: each token's parent, 0 for the last emitted token, ``i`` for the ``i``-th of
            ``tokens``; ``None`` for a chain.
        depth: Depth of a tree: its longest path, in tokens.
        confidence: ``(B, K)``, float64, the probability that each token of a chain is accepted, predicted by the heads
            before they sampled it; ``None`` if they predict none.
    """

    tokens: Int[Tensor, "B K"]
    logits: Float[Tensor, "B K V"] | None = None
    probs: Float[Tensor, "B K V"] | None = None
    counts: Int[Tensor, " B"] | None = None
    parents: Int[Tensor, "B K"] | None = None
    depth: int = 0
    confidence: Float[Tensor, "B K"] | None = None


@runtime_checkable
class DraftSampler(Protocol):
    """Samples drafts from a head's logits, one depth after the other.

    Attributes:
        done: Whether no row needs another draft; drafting then ends early.
    """

    done: bool

    def __call__(
        self, logits: Float[Tensor, "B V"], confidence: Float[Tensor, " B"] | None = None
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, "B V"] | None]:
        """Return the next draft of every row, and the distributions it was sampled from; ``None`` if not sampled.

        Args:
            logits: Of the head that drafts.
            confidence: Probability that the draft will be accepted, if the heads predict it.
        """


class GreedySampler:
    """Draft the argmax."""

    done = False

    def __call__(
        self, logits: Float[Tensor, "B V"], confidence: Float[Tensor, " B"] | None = None
    ) -> tuple[Int[Tensor, " B"], None]:
        """Return the argmax of every row."""
        return logits.argmax(dim=-1), None


def one_hot(tokens: Int[Tensor, "*N"], size: int) -> Int[Tensor, "*N V"]:
    """One-hot encode tokens, without the CPU synchronisation of ``torch.nn.functional.one_hot``.

    Args:
        tokens: Numbers below ``size``.
        size: Number ``V`` of classes.

    Example:
        >>> import torch
        >>> one_hot(torch.tensor([2, 0]), 3).tolist()
        [[0, 0, 1], [1, 0, 0]]
    """
    return (tokens[..., None] == torch.arange(size, device=tokens.device)).long()


def ancestors_of(parents: Int[Tensor, "B C"]) -> Bool[Tensor, "B C C"]:
    """Return for each token of a tree which tokens lie on the path from the root to it, both included.

    Args:
        parents: Index of each token's parent; -1 for the root. A parent comes before its children.
    """
    size = parents.shape[1]
    reachable = one_hot(parents + 1, size + 1)[:, :, 1:].float()
    reachable = reachable + torch.eye(size, device=parents.device)
    reach = 1
    while reach < size:
        reachable = (reachable @ reachable).clamp(max=1)
        reach *= 2
    return reachable > 0
