"""Sentences that answer a study's question, computed from its results."""

import math
from collections.abc import Callable, Sequence

from mtp_modules.reports.look import is_share, key_label, sentence_start
from mtp_modules.reports.needed import higher_is_better, needed
from mtp_modules.reports.tables import number, show
from mtp_modules.studies import Estimate, Outcome, estimate


def difference(
    outcome: Outcome,
    *,
    key: str = "loss/head_1",
    arms: Sequence[str] | None = None,
    to: str | None = None,
    value: float | None = None,
    worth: float = 0.0,
) -> str:
    """Return which arms are better and which are worse than the baseline in a final metric.

    An arm differs if the 95% confidence interval of the difference, paired by seed, does not contain 0.

    Args:
        outcome: Outcome of the study.
        key: Key of the metric.
        arms: Arms to compare; all others if ``None``.
        to: The baseline; the first arm if ``None``.
        value: Value of the sweep; the last if ``None``.
        worth: Differences up to this size do not count, even if they are significant.
    """
    to, value = outcome.arms[0] if to is None else to, outcome.last_value if value is None else value
    base = outcome.final(to, value, key)
    names = [arm for arm in (outcome.arms if arms is None else arms) if arm in outcome.arms and arm != to]
    found = {arm: _difference(outcome, to, arm, value, key) for arm in names}
    groups: dict[str, list[str]] = {"better": [], "worse": [], "similar": []}
    for arm, estimated in found.items():
        if estimated is None:
            continue
        groups[_compared(estimated, higher_is_better(key), worth)].append(f"{arm} ({_signed(estimated, key)})")
    place = "" if outcome.study.sweep is None else f" (at {outcome.study.sweep.label} {value:g})"
    start = f"{sentence_start(key_label(key))}{place}: {to} has {show(base, key)}."
    words = {
        "better": "Better: {}.",
        "worse": "Worse: {}.",
        "similar": "Not distinguishable from it: {}.",
    }
    parts = [words[kind].format("; ".join(arms)) for kind, arms in groups.items() if arms]
    return " ".join([start, *parts])


def data_needed(
    outcome: Outcome,
    *,
    arm: str,
    key: str = "loss/head_1",
    x: str = "tokens",
    target: float | None = None,
    claimed: float | None = None,
) -> str:
    """Return how much data (or another quantity) an arm needs to reach the result of the first arm.

    Args:
        outcome: Outcome of a study with a sweep.
        arm: Name of the arm.
        key: Key of the metric that must reach the level.
        x: Key of the required quantity; ``value`` for the value of the sweep.
        target: Level to reach; see :func:`~mtp_modules.reports.needed.needed`.
        claimed: The claimed ratio.
    """
    ratio = needed(outcome, arm, key=key, x=x, target=target)
    sweep = outcome.study.sweep
    what = sweep.label if x == "value" and sweep is not None else key_label(x)
    level = "the same level" if target is None else f"{number(target, key)}"
    sentence = (
        f"To reach {level} in {key_label(key)}, {arm} needs {ratio.words} times the {what} that {outcome.arms[0]} needs"
    )
    if claimed is None:
        return f"{sentence} (n = {ratio.n})."
    if ratio.ratio is not None:
        low, high = math.exp(ratio.ratio.low), math.exp(ratio.ratio.high)
    else:
        low, high = ratio.low, ratio.high
    if ratio.n == 1:
        judged = "inconclusive with one seed"
    elif high < 1 and low <= claimed:
        judged = "supported"
    elif high < 1:
        judged = "less is needed, but not as little as claimed"
    elif low > 1:
        judged = "not supported, more is needed"
    else:
        judged = "not supported" if low > claimed else "inconclusive with these seeds"
    return f"{sentence} (n = {ratio.n}). The claim is {claimed:.2g}: {judged}."


KINDS: dict[str, Callable[..., str]] = {"difference": difference, "data_needed": data_needed}


def _difference(outcome: Outcome, to: str, arm: str, value: float | None, key: str) -> Estimate | None:
    theirs, mine = (outcome.by_seed(name, value, key) for name in (to, arm))
    seeds = sorted(theirs.keys() & mine.keys())
    return estimate([mine[seed] - theirs[seed] for seed in seeds]) if seeds else None


def _compared(found: Estimate, higher: bool, worth: float) -> str:
    if found.half is None or found.low <= 0 <= found.high or abs(found.mean) <= worth:
        return "similar"
    return "better" if (found.mean > 0) == higher else "worse"


def _signed(found: Estimate, key: str) -> str:
    """Return a difference with its sign; in percentage points if the metric is a fraction."""
    sign = "+" if found.mean >= 0 else "-"
    words = f"{sign}{number(abs(found.mean), key, precise_to=found.half)}"
    if found.half is not None:
        words += f" ± {number(found.half, key, precise_to=found.half)}"
    return f"{words.replace('%', '')} points" if is_share(key) else words
