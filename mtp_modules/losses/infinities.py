"""Sums in which an infinite term with weight 0 adds nothing: a token whose logit is -inf has an infinite loss."""

import torch

from mtp_modules.core.shapes import Bool, Float, Tensor


def blended(start: Float[Tensor, "*N"], end: Float[Tensor, "*N"], share: Float[Tensor, "*N"] | float) -> Tensor:
    """Return ``(1 - share) * start + share * end``, where a side with share 0 may be infinite.

    Args:
        start: Values at share 0.
        end: Values at share 1.
        share: In [0, 1].
    """
    if isinstance(share, Tensor):
        return torch.where(share < 1, start, 0.0) * (1 - share) + torch.where(share > 0, end, 0.0) * share
    return start if share == 0 else end if share == 1 else start * (1 - share) + end * share


def weighted(
    losses: Float[Tensor, "*N"], weights: Float[Tensor, "*N"], counts: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """Return losses times weights; 0 where there is no target, or an infinite loss has weight 0.

    Args:
        losses: One per example.
        weights: Factor of each.
        counts: Which examples have a target.
    """
    return torch.where(counts & (losses.isfinite() | (weights != 0)), losses, 0.0) * weights


def expected(probs: Float[Tensor, "N V"], values: Float[Tensor, "N V"]) -> Float[Tensor, "N 1"]:
    """Return the mean of values under a distribution, without those of probability 0, which may be infinite.

    Args:
        probs: One distribution per row.
        values: Logits; NaN counts as 0, so look for it elsewhere.
    """
    products = probs * values
    return products.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(dim=1, keepdim=True)
