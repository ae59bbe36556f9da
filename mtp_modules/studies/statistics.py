"""Means over seeds and their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_modules.core.checks import at_least

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Mean of the values.
        half: Half the width of the 95% confidence interval of the mean; ``None`` with fewer than two values.
        n: Number of values.
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean without an interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean without an interval."""
        return self.mean + (self.half or 0.0)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its 95% confidence interval by Student's t distribution.

    Args:
        values: One value per seed.

    Raises:
        ValueError: If there are no values.

    Example:
        >>> found = estimate([1.0, 2.0, 3.0])
        >>> round(found.mean, 3), round(found.half, 3), found.n
        (2.0, 2.484, 3)
    """
    at_least("estimate", "number of values", len(values), 1)
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, student_quantile(0.5 + CONFIDENCE / 2, n - 1) * math.sqrt(variance / n), n)


def student_within(t: float, freedom: int) -> float:
    """Return the probability that Student's t lies in ``[-t, t]``.

    A finite sum for an integer number of degrees of freedom: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

    Args:
        t: At least 0.
        freedom: Degrees of freedom, at least 1.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for index in range(freedom // 2):
        total += term
        step = 2 * index + 1 + odd
        term *= cosine**2 * step / (step + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def student_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution, by bisection.

    Args:
        probability: From 0.5 to below 1.
        freedom: Degrees of freedom, at least 1.

    Raises:
        ValueError: If ``freedom`` is below 1.
    """
    at_least("student_quantile", "freedom", freedom, 1)
    low, high = 0.0, 1.0
    while student_within(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2
