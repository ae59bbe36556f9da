"""Reliability diagrams: how often what has a probability happens."""

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_modules.core.shapes import Bool, Float, Tensor

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """A bin of the reliability diagram: drafts whose probability lies in one tenth of [0, 1].

    Attributes:
        count: Number of drafts.
        confidence: Mean probability of the drafts.
        accepted: Fraction of the drafts that were accepted.
    """

    count: int
    confidence: float
    accepted: float


def calibration_bins(confidence: Float[Tensor, " N"], accepted: Bool[Tensor, " N"]) -> list[Bin]:
    """Sort drafts by their probability into ten bins of equal width.

    Args:
        confidence: Probability of each draft.
        accepted: Whether each draft was accepted.

    Example:
        >>> import torch
        >>> bins = calibration_bins(torch.tensor([0.95, 0.91, 0.25]), torch.tensor([True, False, False]))
        >>> [(one.count, round(one.confidence, 2), one.accepted) for one in bins if one.count]
        [(1, 0.25, 0.0), (2, 0.93, 0.5)]
    """
    index = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    found = []
    for place in range(NUM_BINS):
        inside = index == place
        count = int(inside.sum())
        mean = confidence[inside].mean().item() if count else (place + 0.5) / NUM_BINS
        found.append(Bin(count, mean, accepted[inside].double().mean().item() if count else 0.0))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance between confidence and acceptance over the bins, weighted by their counts.

    Args:
        bins: Bins of drafts.

    Example:
        >>> calibration_error([Bin(3, 0.5, 0.5), Bin(1, 0.9, 0.5)])
        0.1
    """
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.accepted - one.confidence) for one in bins) / max(total, 1)
