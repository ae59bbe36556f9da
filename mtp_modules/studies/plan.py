"""Set the length of every run: equal data, FLOPs or seconds for all arms, within a time budget."""

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
"""Fraction of the budget that is planned; the rest covers costs that the calibration did not measure."""


@dataclass(frozen=True)
class Cost:
    """The cost of an optimizer step of a cell, counted or measured.

    Attributes:
        examples: Rows.
        tokens: Positions that the trunk reads.
        flops: Floating-point operations.
        seconds: Compute time: CPU time without a GPU, wall-clock time with one.
        wall: Wall-clock seconds.
        setup: Wall-clock seconds before the first step and after the last one, without evaluations.
        evaluation: Wall-clock seconds of one evaluation.
        parameters: Number of the model's parameters.
        keys: Keys of the metrics of an evaluation.
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
        """Return the matched quantity that one step uses.

        Args:
            match: ``data``, ``flops`` or ``seconds``.
        """
        return {"data": float(self.tokens), "flops": float(self.flops), "seconds": self.seconds}[match]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        cell: Configuration of the run.
        seed: Seed of weights, order and, unless the study fixes it, data.
        steps: Number of optimizer steps.
        points: Number of evaluations during training.
        decode: Settings of the decoding at the end, as plain values.
        spent: FLOPs that its helpers have used.
    """

    cell: Cell
    seed: int
    steps: int
    points: int
    decode: dict[str, Any] | None
    spent: int = 0

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.cell.label}, seed {self.seed}"

    @property
    def hash(self) -> str:
        """Hash of everything that the result depends on."""
        return content_hash({"run": asdict(self), "version": __version__})

    def evaluated_at(self) -> list[int]:
        """Return the steps after which the run is evaluated, the last step included."""
        points = min(self.points, self.steps)
        return [round(self.steps * (index + 1) / points) for index in range(points)]


def reference(cell: Cell, cells: Sequence[Cell]) -> Cell:
    """Return the first arm at the sweep value of a cell.

    Args:
        cell: Cell of an arm or a helper.
        cells: Cells of the arms, in order.
    """
    return next(other for other in cells if other.value == cell.value)


def plan_runs(study: Study, costs: Mapping[str, Cost], *, seeds: int, scale: float) -> list[Run]:
    """Return all runs with their lengths, helpers first.

    The first arm takes ``study.steps * scale`` steps. The other arms take as many steps as use the same amount of data,
    FLOPs or seconds. If FLOPs or seconds are matched, the cost of an arm's helpers counts towards its own. A helper
    takes the fraction ``share`` of the first arm's steps.

    Args:
        study: The study.
        costs: Cost of a step of every cell, by label.
        seeds: Number of runs per cell.
        scale: Factor of all lengths.

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
                f"is matched by {cell.match}, but its helpers alone use {taken / amount:.2g} times what "
                f"{first.arm!r} uses; give the helpers a smaller share.",
            )
        length = max(1, round(left / costs[cell.label].matched(cell.match)))
        spent = sum(steps[helper.label] * costs[helper.label].flops for helper in mine)
        found += [Run(cell, seed, length, study.points, decode, spent) for seed in range(1, seeds + 1)]
    return found


def seconds_of(run: Run, cost: Cost) -> float:
    """Return the expected wall-clock seconds of a run.

    Args:
        run: The run, with its length.
        cost: Cost of its cell.
    """
    return cost.setup + run.steps * cost.wall + len(run.evaluated_at()) * cost.evaluation


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Return when the last job ends if each idle worker takes the next job.

    Args:
        seconds: Duration of the jobs, in order.
        workers: Number of workers.

    Example:
        >>> makespan([3.0, 1.0, 1.0, 2.0], workers=2)
        4.0
    """
    free = [0.0] * workers
    for duration in seconds:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def duration(runs: Sequence[Run], costs: Mapping[str, Cost], workers: int) -> float:
    """Return the expected seconds of all runs: helpers first, then the arms.

    Args:
        runs: All runs.
        costs: Cost of a step, by label of the cell.
        workers: Number of parallel processes.
    """
    groups = ([run for run in runs if run.cell.is_helper == helper] for helper in (True, False))
    return sum(makespan((seconds_of(run, costs[run.cell.label]) for run in group), workers) for group in groups)


def plan_within(
    study: Study, costs: Mapping[str, Cost], *, seeds: int, minutes: float | None, workers: int
) -> tuple[list[Run], float]:
    """Return all runs, scaled down by one factor to fit the budget, and that factor.

    Args:
        study: The study.
        costs: Cost of a step, by label of the cell.
        seeds: Number of runs per cell.
        minutes: Budget in minutes; unlimited if ``None``.
        workers: Number of parallel processes.

    Raises:
        ValueError: If one step of every run does not fit; the message gives a budget that is large enough.
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
            f"{study.name!r}, {workers} at a time; allow {enough:g} minutes, or use fewer --seeds.",
        )
    low, high = smallest, 1.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        fits = duration(plan_runs(study, costs, seeds=seeds, scale=middle), costs, workers) <= allowed
        low, high = (middle, high) if fits else (low, middle)
    return plan_runs(study, costs, seeds=seeds, scale=low), low
