"""Weights of the horizons in the loss."""

import math
from collections.abc import Sequence

from mtp_modules.core.checks import finite, refuse
from mtp_modules.core.objective import HorizonWeights


def _preserving_total(weights: list[float], preserve_total: bool) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights] if preserve_total and total > 0 else weights


def checked_weights(owner: object, weights: Sequence[float], num_horizons: int) -> list[float]:
    """Return weights of horizons as a list, or raise an error if they cannot weight a loss.

    Args:
        owner: Who gives them.
        weights: One per horizon.
        num_horizons: Number ``H`` of horizons.

    Raises:
        ValueError: If there are more or fewer than horizons, or one is negative, infinite or not a number.
    """
    values = [float(weight) for weight in weights]
    if len(values) != num_horizons:
        refuse(owner, f"weights must hold one number per horizon ({num_horizons}), got {len(values)}.")
    for index, value in enumerate(values):
        finite(owner, f"weights[{index}]", value, 0)
    return values


class UniformWeights(HorizonWeights):
    """Weight all horizons equally, as in Gloeckle et al. 2024 (arXiv 2404.19737), equation 2.

    Args:
        preserve_total: Scale the weights so that they sum to 1, which keeps the loss comparable over ``H``.

    Example:
        >>> UniformWeights()(3)
        [1.0, 1.0, 1.0]
    """

    def __init__(self, *, preserve_total: bool = False) -> None:
        self.preserve_total = preserve_total

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon."""
        return _preserving_total([1.0] * num_horizons, self.preserve_total)


class GeometricWeights(HorizonWeights):
    """Weight horizon ``h`` by ``gamma ** (h - 1)``.

    Args:
        gamma: Factor from one horizon to the next, at least 0.
        preserve_total: Scale the weights so that they sum to 1.

    Raises:
        ValueError: If ``gamma`` is negative, infinite or not a number.

    Example:
        >>> GeometricWeights(gamma=0.5)(3)
        [1.0, 0.5, 0.25]
    """

    def __init__(self, *, gamma: float, preserve_total: bool = False) -> None:
        finite(self, "gamma", gamma, 0)
        self.gamma, self.preserve_total = gamma, preserve_total

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon."""
        try:
            weights = [self.gamma**index for index in range(num_horizons)]
        except OverflowError:
            refuse(self, f"gamma must be smaller for {num_horizons} horizons, got {self.gamma}.")
        return _preserving_total(weights, self.preserve_total)


class AuxiliaryWeights(HorizonWeights):
    """Weight the next token by 1, and every horizon beyond it by the same smaller weight, or one that decays.

    Equal weights raise the next-token loss of small models; a small auxiliary weight does not. A draft counts only if
    those before it are accepted, so its weight may decay: draft ``k``, that of the ``k``-th horizon beyond the first,
    weighs ``weight * exp(-(k - 1) / decay)`` (DFlash, arXiv 2602.06036).

    Args:
        weight: Weight of each horizon beyond the first, at least 0; of the second, if the weights decay.
        decay: In how many horizons the weight falls to 1/e; it stays the same if ``None``.

    Raises:
        ValueError: If ``weight`` is negative, ``decay`` is not above 0, or one is infinite or not a number.

    Example:
        >>> AuxiliaryWeights(weight=0.1)(3)
        [1.0, 0.1, 0.1]
        >>> [round(weight, 2) for weight in AuxiliaryWeights(weight=1.0, decay=4.0)(4)]
        [1.0, 1.0, 0.78, 0.61]
    """

    def __init__(self, *, weight: float, decay: float | None = None) -> None:
        finite(self, "weight", weight, 0)
        if decay is not None:
            finite(self, "decay", decay, 0, above=True)
        self.weight, self.decay = weight, decay

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon."""
        drafts = range(num_horizons - 1)
        return [
            1.0,
            *(self.weight * (1.0 if self.decay is None else math.exp(-draft / self.decay)) for draft in drafts),
        ]


class ExplicitWeights(HorizonWeights):
    """Use the given weight of each horizon.

    Args:
        values: Weights, nearest horizon first, each at least 0 and not all 0.

    Raises:
        ValueError: If a weight is negative, infinite or not a number, or all are 0.

    Example:
        >>> ExplicitWeights(values=[1.0, 0.3])(2)
        [1.0, 0.3]
    """

    def __init__(self, *, values: Sequence[float]) -> None:
        for index, value in enumerate(values):
            finite(self, f"values[{index}]", value, 0)
        if not any(values):
            refuse(self, f"values must hold a weight above 0, got {list(values)}.")
        self.values = list(values)

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon."""
        if len(self.values) != num_horizons:
            refuse(self, f"values holds {len(self.values)} weights for {num_horizons} horizons; give one per horizon.")
        return self.values
