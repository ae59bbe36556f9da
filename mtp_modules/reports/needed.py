"""How much an arm needs to reach the result of another: the number behind claims such as "a third of the data"."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_modules.core.checks import refuse
from mtp_modules.studies import Estimate, Outcome, estimate

_HIGHER_IS_BETTER = ("accuracy", "answer", "written", "accepted", "decode", "tokens_per_second")


@dataclass(frozen=True)
class Needed:
    """A ratio over seeds.

    Attributes:
        ratio: Mean of the ratio's logarithm, with its interval; ``None`` if a seed gives a bound only.
        low: Lower bound over seeds.
        high: Upper bound over seeds; infinite if unknown.
        n: Number of seeds.
    """

    ratio: Estimate | None
    low: float
    high: float
    n: int

    @property
    def words(self) -> str:
        """The ratio as text for tables."""
        if self.ratio is not None:
            ends = (
                "" if self.ratio.half is None else f" [{math.exp(self.ratio.low):.2f}, {math.exp(self.ratio.high):.2f}]"
            )
            return f"{math.exp(self.ratio.mean):.2f}{ends}"
        if math.isinf(self.high):
            return f"more than {self.low:.3g}" if self.low else "an unknown number of"
        return f"less than {self.high:.3g}" if self.low == 0.0 else f"between {self.low:.3g} and {self.high:.3g}"


def higher_is_better(key: str) -> bool:
    """Whether a higher value of a metric is better.

    Args:
        key: Key of the metric.
    """
    return key.rpartition(": ")[2].startswith(_HIGHER_IS_BETTER)


def reached_at(x: Sequence[float], y: Sequence[float], level: float) -> tuple[float, float]:
    """Return lower and upper bound of the ``x`` at which a curve first reaches a level; both are equal if it is known.

    Between two points the curve is interpolated linearly over the logarithm of ``x``.

    Args:
        x: Ascending values above 0.
        y: One value for each ``x``; smaller is better.
        level: Level to reach.

    Example:
        >>> reached_at([1.0, 4.0], [3.0, 1.0], level=2.0)
        (2.0, 2.0)
        >>> reached_at([1.0, 4.0], [3.0, 1.0], level=0.5)
        (4.0, inf)
        >>> reached_at([1.0, 4.0], [3.0, 1.0], level=5.0)
        (0.0, 1.0)
    """
    if y[0] <= level:
        return (x[0], x[0]) if y[0] == level else (0.0, x[0])
    for (left, above), (right, below) in zip(zip(x, y, strict=True), zip(x[1:], y[1:], strict=True), strict=False):
        if below <= level:
            share = (above - level) / (above - below)
            place = math.exp(math.log(left) + share * (math.log(right) - math.log(left)))
            return place, place
    return x[-1], math.inf


def needed(outcome: Outcome, arm: str, *, key: str, x: str, target: float | None) -> Needed:
    """Return how much an arm needs to reach a level, relative to the first arm, paired by seed.

    Without a target, the level is the worse of the two final results. A better arm is measured by how much less it
    needs for the first arm's result, a worse one by how much less the first arm needs for the arm's result. The ratio
    is therefore known unless one arm's first point is already better than the other's last.

    Args:
        outcome: Outcome of a study with a sweep.
        arm: Name of the arm.
        key: Key of the metric.
        x: Key of the required quantity; ``value`` for the value of the sweep.
        target: Level to reach.

    Raises:
        ValueError: If the study has no sweep, or no seed has both curves.
    """
    if outcome.study.sweep is None:
        refuse("data_needed", f"study {outcome.study.name!r} has no sweep to interpolate over; add a sweep.")
    sign = -1.0 if higher_is_better(key) else 1.0
    first, lows, highs = outcome.arms[0], [], []
    seeds = set(outcome.by_seed(first, outcome.last_value, key)) & set(outcome.by_seed(arm, outcome.last_value, key))
    for seed in sorted(seeds):
        mine, theirs = (_by_value(outcome, name, seed, key, x, sign) for name in (arm, first))
        level = max(mine[1][-1], theirs[1][-1]) if target is None else sign * target
        (low, high), (their_low, their_high) = (reached_at(*points, level) for points in (mine, theirs))
        lows.append(0.0 if math.isinf(their_high) else low / their_high)
        highs.append(math.inf if their_low == 0.0 else high / their_low)
    if not lows:
        refuse("data_needed", f"{arm!r} and {first!r} have no common seed with metric {key!r}.")
    if lows == highs:
        return Needed(estimate([math.log(ratio) for ratio in lows]), min(lows), max(highs), len(lows))
    return Needed(None, min(lows), max(highs), len(lows))


def _by_value(outcome: Outcome, arm: str, seed: int, key: str, x: str, sign: float) -> tuple[list[float], list[float]]:
    """Return what one seed used at each value of the sweep, and its result, where smaller is better."""
    across, reached = [], []
    for value in outcome.study.sweep_values:
        assert value is not None
        found = outcome.by_seed(arm, value, key).get(seed)
        used = float(value) if x == "value" else outcome.by_seed(arm, value, x).get(seed)
        if found is not None and used is not None:
            across.append(used)
            reached.append(sign * found)
    return across, reached
