"""Trees of drafts, as the places of parents."""

import torch

from mtp_modules.core.shapes import Bool, Int, Tensor


def ancestors_of(parents: Int[Tensor, "B C"]) -> Bool[Tensor, "B C C"]:
    """Return for each token of a tree which tokens lie between the root and it, both included.

    Args:
        parents: Place of the token before each token; -1 for the root. A parent comes before its children.
    """
    size = parents.shape[1]
    known = torch.nn.functional.one_hot(parents + 1, size + 1)[:, :, 1:].float()
    known = known + torch.eye(size, device=parents.device)
    reach = 1
    while reach < size:
        known = (known @ known).clamp(max=1)
        reach *= 2
    return known > 0
