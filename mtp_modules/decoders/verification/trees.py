"""Verification of a tree of drafts: the path that the model's own choices take through it."""

from typing import NamedTuple

import torch

from mtp_modules.core.drafts import one_hot
from mtp_modules.core.shapes import Bool, Int, Tensor


class Walk(NamedTuple):
    """The path through a tree that the model's own choices take.

    Attributes:
        tokens: ``(B, P)``, the model's choice after the root, after the first accepted draft, and so on.
        path: ``(B, P)``, places of the root and the accepted drafts in the chunk.
        accepted: ``(B,)``, how many drafts lie on the path.
    """

    tokens: Int[Tensor, "B P"]
    path: Int[Tensor, "B P"]
    accepted: Int[Tensor, " B"]


def walk(chunk: Int[Tensor, "B C"], parents: Int[Tensor, "B C"], own: Int[Tensor, "B C"], depth: int) -> Walk:
    """Follow the model's own choices as far as the tree has them.

    Args:
        chunk: The token emitted last, the root, and drafts.
        parents: Place in the chunk of the token before each; -1 for the root.
        own: The model's choice after each token of the chunk.
        depth: Most drafts one after the other.
    """
    rows = torch.arange(len(own), device=own.device)
    place = torch.zeros_like(rows)
    accepted, alive = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    path, tokens = [place], [own[:, 0]]
    for _ in range(depth):
        fits = (parents == place[:, None]) & (chunk == tokens[-1][:, None])
        alive = alive & fits.any(dim=1)
        accepted = accepted + alive
        place = torch.where(alive, fits.to(torch.int8).argmax(dim=1), place)
        path.append(place)
        tokens.append(own[rows, place])
    return Walk(torch.stack(tokens, dim=1), torch.stack(path, dim=1), accepted)


def counts_along(
    chunk: Int[Tensor, "B C"], ancestors: Bool[Tensor, "B C C"], emitted: Int[Tensor, "B V"]
) -> Int[Tensor, "B C V"]:
    """Return how often each token is in the output if the text went from the root to each token of a tree."""
    drafts = one_hot(chunk, emitted.shape[1]).float()
    drafts[:, 0] = 0
    return emitted[:, None] + (ancestors.float() @ drafts).round().long()
