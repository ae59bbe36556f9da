"""How long every run is: the same data, operations or seconds for all, and all of it within a budget."""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mtp_modules import __version__
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.studies.cells import Cell
from mtp_modules.studies.results import content_hash
from mtp_modules.studies.spec import Study

RESERVE = 0.95
"""Share of the budget that is planned for; the rest is for what the calibration did not see."""


@dataclass(frozen=True)
class Cost:
    """What an optimizer step of a cell takes, counted or measured.

    Attributes:
        examples: Rows.
        tokens: Positions that the trunk reads.
        flops: Floating-point operations.
        seconds: Of computing: of the processor where that computes, of the clock for a GPU.
        wall: Seconds of the clock.
        setup: Seconds of the clock before the first step and after the last one, without evaluations.
        evaluation: Seconds of the clock of one evaluation.
        parameters: Of the model.
        keys: Names of the figures that an evaluation gives.
    """

    examples: int
    tokens: int
    flops: int
    seconds: float
    wall: float
    setup: float
    evaluation: float
    parameters: int
    keys: tuple[str, ...]

    def matched(self, match: str) -> float:
        """Return what is held equal, a step.

        Args:
            match: data, flops or seconds.
        """
        return {"data": float(self.tokens), "flops": float(self.flops), "seconds": self.seconds}[match]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        cell: What is trained.
        seed: Of weights, order and, unless the study fixes it, data.
        steps: Optimizer steps.
        points: Evaluations on the way.
        decode: What to decode in the end, as plain values.
        spent: Operations that its helpers have cost.
    """

    cell: Cell
    seed: int
    steps: int
    points: int
    decode: dict[str, Any] | None
    spent: int = 0

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return f"{self.cell.label}, seed {self.seed}"

    @property
    def hash(self) -> str:
        """Changes with everything that the result depends on."""
        return content_hash({"run": asdict(self), "version": __version__})

    def evaluated_at(self) -> list[int]:
        """Return the steps after which it is evaluated; the last step is one of them."""
        points = min(self.points, self.steps)
        return [round(self.steps * (index + 1) / points) for index in range(points)]


def reference(cell: Cell, cells: Sequence[Cell]) -> Cell:
    """Return the first arm at a cell's value of the sweep.

    Args:
        cell: Any, a helper too.
        cells: Those of the arms, in order.
    """
    return next(other for other in cells if other.value == cell.value)


def plan_runs(study: Study, costs: Mapping[str, Cost], *, seeds: int, scale: float) -> list[Run]:
    """Return all runs, those of helpers first, with their lengths.

    The first arm takes ``study.steps`` times ``scale`` steps, and the others as many as use what it uses of data, FLOPs
    or seconds. What an arm's helpers cost counts as its own where FLOPs or seconds are matched. A helper takes its own
    share of the first arm's steps.

    Args:
        study: With its arms.
        costs: Of a step of every cell, by its label.
        seeds: Runs a cell.
        scale: Of all lengths.

    Raises:
        ValueError: If the helpers of an arm cost more than the first arm.
    """
    helpers, cells = study.helper_cells(), study.cells()
    decode = None if study.decode is None else asdict(study.decode)
    steps = {helper.label: max(1, round(study.steps * scale * helper.share)) for helper in helpers}
    found = [Run(cell, seed, steps[cell.label], 1, None) for cell in helpers for seed in range(1, seeds + 1)]
    for cell in cells:
        first = reference(cell, cells)
        mine = [helper for helper in helpers if helper.arm in cell.needs and helper.value == cell.value]
        amount = study.steps * scale * cell.share * costs[first.label].matched(cell.match)
        taken = sum(steps[helper.label] * costs[helper.label].matched(cell.match) for helper in mine)
        left = amount if cell.match == "data" else amount - taken
        if left <= 0:
            refuse(
                f"arm {cell.label!r}",
                f"is matched by {cell.match}, but its helpers alone take {taken / amount:.2g} times what "
                f"{first.arm!r} takes; give the helpers a smaller share.",
            )
        length = max(1, round(left / costs[cell.label].matched(cell.match)))
        spent = sum(steps[helper.label] * costs[helper.label].flops for helper in mine)
        found += [Run(cell, seed, length, study.points, decode, spent) for seed in range(1, seeds + 1)]
    return found


def seconds_of(run: Run, cost: Cost) -> float:
    """Return how long a run will take by the clock.

    Args:
        run: With its length.
        cost: Of its cell.
    """
    return cost.setup + run.steps * cost.wall + len(run.evaluated_at()) * cost.evaluation


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Return when the last of some jobs ends, if each idle worker takes the next one.

    Args:
        seconds: Of the jobs, in order.
        workers: How many work.

    Example:
        >>> makespan([3.0, 1.0, 1.0, 2.0], workers=2)
        4.0
    """
    free = [0.0] * workers
    for duration in seconds:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def duration(runs: Sequence[Run], costs: Mapping[str, Cost], workers: int) -> float:
    """Return how many seconds all runs take: helpers first, then the arms.

    Args:
        runs: All of them.
        costs: By label of the cell.
        workers: Processes at a time.
    """
    groups = ([run for run in runs if run.cell.is_helper == helper] for helper in (True, False))
    return sum(makespan((seconds_of(run, costs[run.cell.label]) for run in group), workers) for group in groups)


def plan_within(
    study: Study, costs: Mapping[str, Cost], *, seeds: int, minutes: float | None, workers: int
) -> tuple[list[Run], float]:
    """Return all runs, scaled down alike so that they fit the budget, and the scale.

    Args:
        study: With its arms.
        costs: By label of the cell.
        seeds: Runs a cell.
        minutes: Budget; none if ``None``.
        workers: Processes at a time.

    Raises:
        ValueError: If not even one step of every run fits; the sentence says how many minutes would do.
    """
    runs, scale = plan_runs(study, costs, seeds=seeds, scale=1.0), 1.0
    if minutes is None:
        return runs, scale
    at_least("study", "budget", minutes, 0)
    allowed = RESERVE * 60 * minutes
    if duration(runs, costs, workers) <= allowed:
        return runs, scale
    smallest = 1.0 / (study.steps * min([1.0, *(helper.share for helper in study.helper_cells())]))
    shortest = plan_runs(study, costs, seeds=seeds, scale=smallest)
    least = duration(shortest, costs, workers)
    if least > allowed:
        enough = math.ceil(least / RESERVE / 6) / 10
        refuse(
            "study",
            f"a budget of {minutes:g} minutes is too small for one step of each of the {len(runs)} runs of "
            f"{study.name!r}, {workers} at a time; {enough:g} minutes would do, or fewer --seeds.",
        )
    low, high = smallest, 1.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        fits = duration(plan_runs(study, costs, seeds=seeds, scale=middle), costs, workers) <= allowed
        low, high = (middle, high) if fits else (low, middle)
    return plan_runs(study, costs, seeds=seeds, scale=low), low
