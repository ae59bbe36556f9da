"""Which drafts a verification accepts. Pure functions."""

from mtp_modules.core.shapes import Int, Tensor


def accept_greedy(drafts: Int[Tensor, "B K"], choices: Int[Tensor, "B C"]) -> Int[Tensor, " B"]:
    """Return how many drafts equal what the model itself would have chosen, up to the first that does not.

    Args:
        drafts: Proposed tokens.
        choices: The model's own choice after the token before the first draft, after the first draft, and so on;
            ``C = K + 1``.

    Example:
        >>> import torch
        >>> accept_greedy(torch.tensor([[4, 5, 6]]), torch.tensor([[4, 5, 7, 8]])).tolist()
        [2]
    """
    return (drafts == choices[:, : drafts.shape[1]]).cumprod(dim=1).sum(dim=1)
