"""Weights that change over a run: schedules, and curricula over the heads."""

from collections.abc import Sequence
from itertools import pairwise

from mtp_modules.core.checks import fraction, refuse
from mtp_modules.core.objective import HorizonWeights


class LinearWeightSchedule(HorizonWeights):
    """Interpolate linearly between two sets of weights over a part of the run.

    Args:
        start: Weights before ``begin``.
        end: Weights after ``finish``.
        begin: Share of the run where the interpolation starts.
        finish: Share of the run where it ends.

    Raises:
        ValueError: If a share lies outside [0, 1], or ``finish`` is not above ``begin``.

    Example:
        >>> from mtp_modules import AuxiliaryWeights
        >>> schedule = LinearWeightSchedule(start=AuxiliaryWeights(weight=0.5), end=AuxiliaryWeights(weight=0.0))
        >>> [schedule(2, progress) for progress in (0.0, 0.5, 1.0)]
        [[1.0, 0.5], [1.0, 0.25], [1.0, 0.0]]
    """

    changes = True

    def __init__(self, *, start: HorizonWeights, end: HorizonWeights, begin: float = 0.0, finish: float = 1.0) -> None:
        fraction(self, "begin", begin)
        fraction(self, "finish", finish)
        if finish <= begin:
            refuse(self, f"finish must lie above begin ({begin}), got {finish}.")
        self.start, self.end, self.begin, self.finish = start, end, begin, finish

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon."""
        share = min(1.0, max(0.0, (progress - self.begin) / (self.finish - self.begin)))
        start, end = self.start(num_horizons, progress), self.end(num_horizons, progress)
        return [(1 - share) * before + share * after for before, after in zip(start, end, strict=True)]


class StepwiseWeightSchedule(HorizonWeights):
    """Use one set of weights after another.

    DeepSeek-V3 (arXiv 2412.19437) lowers the weight of its extra horizon from 0.3 to 0.1 after two thirds of the run.

    Args:
        stages: Weights, in order.
        boundaries: Shares of the run where the next stage begins, one fewer than stages, ascending.

    Raises:
        ValueError: If the numbers of stages and boundaries do not fit, or boundaries do not increase within (0, 1).

    Example:
        >>> from mtp_modules import AuxiliaryWeights
        >>> stages = [AuxiliaryWeights(weight=0.3), AuxiliaryWeights(weight=0.1)]
        >>> schedule = StepwiseWeightSchedule(stages=stages, boundaries=[0.68])
        >>> [schedule(2, progress) for progress in (0.0, 0.67, 0.68)]
        [[1.0, 0.3], [1.0, 0.3], [1.0, 0.1]]
    """

    changes = True

    def __init__(self, *, stages: Sequence[HorizonWeights], boundaries: Sequence[float]) -> None:
        if len(boundaries) != len(stages) - 1:
            refuse(
                self,
                f"boundaries must hold one number fewer than there are stages ({len(stages)}), got {len(boundaries)}.",
            )
        rising = [0.0, *boundaries, 1.0]
        if any(not before < after for before, after in pairwise(rising)):
            refuse(self, f"boundaries must rise between 0 and 1, got {list(boundaries)}.")
        self.stages, self.boundaries = list(stages), list(boundaries)

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon."""
        stage = sum(progress >= boundary for boundary in self.boundaries)
        return self.stages[stage](num_horizons, progress)


class HeadCurriculum(HorizonWeights):
    """Add one head per phase, nearest first (forward), or remove one per phase, farthest first (reverse).

    Phases are equally long, one per horizon. Aynetdinov and Akbik 2025 (arXiv 2505.22757) find that the forward
    curriculum keeps the heads good at drafting, and that the reverse one helps the next token.

    Args:
        weights: Weights of the active heads.
        direction: ``"forward"`` or ``"reverse"``.
        finish: Share of the run that the phases divide; the last one lasts to the end.

    Raises:
        ValueError: If the direction is unknown or the share lies outside (0, 1].

    Example:
        >>> from mtp_modules import UniformWeights
        >>> curriculum = HeadCurriculum(weights=UniformWeights(), direction="forward")
        >>> [curriculum(2, progress) for progress in (0.0, 0.5)]
        [[1.0, 0.0], [1.0, 1.0]]
    """

    changes = True

    def __init__(self, *, weights: HorizonWeights, direction: str, finish: float = 1.0) -> None:
        if direction not in ("forward", "reverse"):
            refuse(self, f"direction must be forward or reverse, got {direction!r}.")
        fraction(self, "finish", finish, zero=False)
        self.weights, self.direction, self.finish = weights, direction, finish

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon."""
        phase = min(num_horizons - 1, int(num_horizons * progress / self.finish))
        heads = phase + 1 if self.direction == "forward" else num_horizons - phase
        weights = self.weights(num_horizons, progress)
        return [weight if index < heads else 0.0 for index, weight in enumerate(weights)]
