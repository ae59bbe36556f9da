"""Run a study: calibrate, plan, train the missing runs, and store every result."""

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mtp_modules import __version__
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.studies.cells import Cell
from mtp_modules.studies.machine import machine, versions
from mtp_modules.studies.outcome import write_plan
from mtp_modules.studies.plan import Cost, Run, duration, plan_within, seconds_of
from mtp_modules.studies.pool import Event, Job, default_workers, run_jobs
from mtp_modules.studies.progress import Progress
from mtp_modules.studies.results import UnusableResultError, content_hash, file_name, read_result, write_result
from mtp_modules.studies.spec import Study
from mtp_modules.studies.training import calibrate, train


class StudyStoppedError(Exception):
    """A signal ended the study. Finished runs are kept.

    Args:
        received: The signal's number.
    """

    def __init__(self, received: int) -> None:
        super().__init__(received)
        self.received = received


@dataclass(frozen=True)
class Plan:
    """The runs of a study on this machine.

    Attributes:
        study: The study.
        seeds: Number of runs per cell.
        minutes: Budget in minutes, or ``None``.
        scale: Factor of all lengths that the budget requires.
        runs: All runs, helpers first.
        costs: Cost of a step, by label of the cell.
    """

    study: Study
    seeds: int
    minutes: float | None
    scale: float
    runs: list[Run]
    costs: dict[str, Cost]


@dataclass
class Folder:
    """The folder of a study's results.

    Attributes:
        root: ``OUTPUT/NAME``.
    """

    root: Path

    def run_file(self, run: Run) -> Path:
        """Return the path of a run's result."""
        return self.root / "runs" / file_name(run.label)

    def cost_file(self, cell: Cell) -> Path:
        """Return the path of a cell's cost."""
        return self.root / "calibration" / file_name(cell.label)

    def helper_folder(self, cell: Cell, seed: int) -> Path:
        """Return the path of a helper's model."""
        return self.root / "helpers" / file_name(f"{cell.label}, seed {seed}").removesuffix(".json")

    def read(self, path: Path, name: str, *, made_for: str | None, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Return a valid result or ``None``, and print why a file is unusable."""
        try:
            return read_result(path, made_for=made_for)
        except UnusableResultError as error:
            say(f"{name}: {path.name} is {error}; it is run again.")
            return None


def run_study(
    study: Study,
    *,
    folder: Path,
    seeds: int | None = None,
    minutes: float | None = None,
    workers: int | None = None,
    check: Callable[[set[str]], None] = lambda keys: None,
) -> tuple[Plan, dict[str, str]]:
    """Train every run of a study that has no valid result.

    Args:
        study: The study.
        folder: Folder for the results.
        seeds: Number of runs per cell; that of the study if ``None``.
        minutes: Budget for all runs; that of the study if ``None``.
        workers: Number of parallel processes; one per GPU or core if ``None``.
        check: Called with the keys of all metrics before the runs start.

    Returns:
        The plan, and the error of each failed run by label.

    Raises:
        ValueError: If the study, a number or the budget is invalid.
        StudyStoppedError: If a signal ends the study.
    """
    seeds = study.seeds if seeds is None else seeds
    minutes = study.minutes if minutes is None else minutes
    workers = default_workers() if workers is None else workers
    at_least("study", "seeds", seeds, 1)
    at_least("study", "workers", workers, 1)
    if minutes is not None and not minutes > 0:
        refuse("study", f"budget must be above 0 minutes, got {minutes:g}.")
    place, bar = Folder(folder), Progress(study.name)
    with _signals(), bar:
        costs = _calibrated(study, place, workers, bar)
        check({key for cost in costs.values() for key in cost.keys})
        runs, scale = plan_within(study, costs, seeds=seeds, minutes=minutes, workers=workers)
        plan = Plan(study, seeds, minutes, scale, runs, costs)
        _note(plan, place, workers)
        missing = [run for run in runs if not _is_done(run, place, bar)]
        bar.plan(
            {run.label: seconds_of(run, costs[run.cell.label]) for run in missing},
            done=len(runs) - len(missing),
            expected=duration(missing, costs, workers),
            steps={run.label: run.steps for run in missing},
            scale=scale,
            workers=workers,
        )
        failed: dict[str, str] = {}
        for helper in (True, False):
            group = [run for run in missing if run.cell.is_helper == helper]
            failed |= _train(group, plan, place, workers, bar, failed)
    return plan, failed


def _note(plan: Plan, place: Folder, workers: int) -> None:
    """Record which results belong to the study."""
    runs = {
        run.label: {"file": place.run_file(run).name, "hash": run.hash} for run in plan.runs if not run.cell.is_helper
    }
    about = {"seeds": plan.seeds, "minutes": plan.minutes, "scale": plan.scale, "workers": workers}
    write_plan(place.root, runs, about)


def _calibrated(study: Study, place: Folder, workers: int, bar: Progress) -> dict[str, Cost]:
    """Return the cost of a step of every cell, by label; cells that differ in length only are measured once."""
    costs: dict[str, Cost] = {}
    models: dict[str, Path] = {}
    scratch = place.root / "calibration" / "helpers"
    for cells in (study.helper_cells(), study.cells()):
        hashes = {cell.label: content_hash({"sections": cell.sections, "version": __version__}) for cell in cells}
        first = {made_for: label for label, made_for in reversed(hashes.items())}
        by_label, jobs = {cell.label: cell for cell in cells}, []
        models |= {cell.arm: scratch / file_name(by_label[first[hashes[cell.label]]].arm) for cell in cells}
        for made_for, label in reversed(first.items()):
            cell = by_label[label]
            known = place.read(place.cost_file(cell), f"calibration of {label}", made_for=made_for, say=bar.say)
            model = models[cell.arm]
            if known is not None and (model.is_dir() or not cell.is_helper):
                costs[label] = Cost(**{**known, "keys": tuple(known["keys"])})
                continue
            helpers = {name: str(models[name]) for name in cell.needs}
            save_to = str(model) if cell.is_helper else None
            jobs.append(Job(label, calibrate, (cell, helpers, save_to)))
        bar.calibrate(len(jobs))
        with closing(run_jobs(jobs, workers=workers)) as events:
            for event in events:
                label = event.job.name
                if event.kind == "done":
                    costs[label] = event.value
                    write_result(place.cost_file(by_label[label]), asdict(event.value), made_for=hashes[label])
                    bar.calibrated()
                elif event.kind != "step":
                    refuse(f"arm {label!r}", str(event.value))
        costs |= {label: costs[first[made_for]] for label, made_for in hashes.items()}
    return costs


def _is_done(run: Run, place: Folder, bar: Progress) -> bool:
    found = place.read(place.run_file(run), run.label, made_for=run.hash, say=bar.say)
    if found is not None and run.cell.is_helper and not place.helper_folder(run.cell, run.seed).is_dir():
        bar.say(f"{run.label}: the model is missing; it is run again.")
        return False
    return found is not None


def _train(
    runs: list[Run], plan: Plan, place: Folder, workers: int, bar: Progress, failed_before: dict[str, str]
) -> dict[str, str]:
    by_label = {run.label: run for run in runs}
    failed: dict[str, str] = {}
    jobs, cells = [], plan.study.helper_cells()
    for run in runs:
        mine = [cell for cell in cells if cell.arm in run.cell.needs and cell.value == run.cell.value]
        lost = [cell.label for cell in mine if f"{cell.label}, seed {run.seed}" in failed_before]
        if lost:
            failed[run.label] = f"its helper {lost[0]} failed."
            continue
        helpers = {cell.arm: str(place.helper_folder(cell, run.seed)) for cell in mine}
        save_to = str(place.helper_folder(run.cell, run.seed)) if run.cell.is_helper else None
        jobs.append(Job(run.label, train, (run, plan.costs[run.cell.label], helpers, save_to)))
    with closing(run_jobs(jobs, workers=workers)) as events:
        for event in events:
            run = by_label[event.job.name]
            if event.kind == "step":
                bar.step(run.label, event.value)
            elif event.kind == "done":
                write_result(place.run_file(run), _described(run, event), made_for=run.hash)
                bar.done(run.label)
            else:
                failed[run.label] = str(event.value).strip()
                bar.failed(run.label, failed[run.label])
    return failed


def _described(run: Run, event: Event) -> dict[str, Any]:
    """Add everything to a result that is needed to reproduce it."""
    about = {
        "arm": run.cell.arm,
        "value": run.cell.value,
        "seed": run.seed,
        "steps": run.steps,
        "settings": run.cell.seeded(run.seed, {name: f"(helper {name})" for name in run.cell.needs}),
        "match": run.cell.match,
        "share": run.cell.share,
        "versions": versions(),
        "machine": machine(),
    }
    return {**about, **event.value}


@contextmanager
def _signals() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into :class:`StudyStoppedError`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StudyStoppedError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
