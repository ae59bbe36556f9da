"""How much an arm needs to get as far as another: the number behind claims such as "a third of the data"."""

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
        ratio: Geometric mean, with the ends of its interval; ``None`` if some seed gives a bound only.
        low: Where it lies at least, over seeds.
        high: Where it lies at most; infinite if unknown.
        n: How many seeds.
    """

    ratio: Estimate | None
    low: float
    high: float
    n: int

    @property
    def words(self) -> str:
        """The ratio as it is written in tables."""
        if self.ratio is not None:
            ends = (
                "" if self.ratio.half is None else f" [{math.exp(self.ratio.low):.2f}, {math.exp(self.ratio.high):.2f}]"
            )
            return f"{math.exp(self.ratio.mean):.2f}{ends}"
        if math.isinf(self.high):
            return f"more than {self.low:.3g}" if self.low else "an unknown number of"
        return f"less than {self.high:.3g}" if self.low == 0.0 else f"between {self.low:.3g} and {self.high:.3g}"


def higher_is_better(key: str) -> bool:
    """Whether more of a figure is better.

    Args:
        key: Of the figure.
    """
    return key.rpartition(": ")[2].startswith(_HIGHER_IS_BETTER)


def reached_at(x: Sequence[float], y: Sequence[float], level: float) -> tuple[float, float]:
    """Return between which two places a curve first comes down to a level: the same place twice where it is known.

    Between two points the curve is taken as straight over the logarithm of ``x``.

    Args:
        x: Ascending, above 0.
        y: One a place; smaller is better.
        level: To be reached.

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
    """Return how much an arm needs to reach a level, over what the first arm needs, paired by seed.

    Without a target, the level is the worse of what the two have reached with all they were given: if the arm is the
    better one, how much less it needs for the first arm's result; if it is the worse one, how much less the first arm
    needs for the arm's. So the ratio is known unless one of them is beyond the other from its first point on.

    Args:
        outcome: Of a study with a sweep.
        arm: Its name.
        key: Of the figure.
        x: Key of what is needed; ``value`` for the value of the sweep.
        target: The level.

    Raises:
        ValueError: If the study has no sweep, or no seed has both curves.
    """
    if outcome.study.sweep is None:
        refuse("data_needed", f"study {outcome.study.name!r} has no sweep, so no run was given less; give it one.")
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
        refuse("data_needed", f"{arm!r} and {first!r} have no seed in common with figure {key!r}.")
    if lows == highs:
        return Needed(estimate([math.log(ratio) for ratio in lows]), min(lows), max(highs), len(lows))
    return Needed(None, min(lows), max(highs), len(lows))


def _by_value(outcome: Outcome, arm: str, seed: int, key: str, x: str, sign: float) -> tuple[list[float], list[float]]:
    """Return what one seed took at each value of the sweep, and what it reached, smaller being better."""
    across, reached = [], []
    for value in outcome.study.sweep_values:
        assert value is not None
        found = outcome.by_seed(arm, value, key).get(seed)
        took = float(value) if x == "value" else outcome.by_seed(arm, value, x).get(seed)
        if found is not None and took is not None:
            across.append(took)
            reached.append(sign * found)
    return across, reached
