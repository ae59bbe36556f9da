"""All results of a study, as reports ask for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_modules.core.checks import refuse
from mtp_modules.studies.results import UnusableResultError, read_result, write_result
from mtp_modules.studies.spec import Study
from mtp_modules.studies.statistics import Estimate, estimate

PLAN = "plan.json"


@dataclass(frozen=True)
class Outcome:
    """Results of the arms, those of helpers left out.

    Attributes:
        study: What was asked.
        results: Contents of the result files, in order of arm, value and seed.
        missing: Labels of runs without a result.
        about: ``seeds``, ``minutes``, ``scale`` and ``workers`` that it was run with.
    """

    study: Study
    results: list[dict[str, Any]]
    missing: list[str]
    about: dict[str, Any]

    @property
    def arms(self) -> list[str]:
        """Names of the arms that have results, in order."""
        present = {result["arm"] for result in self.results}
        return [name for name in self.study.arm_names if name in present]

    @property
    def last_value(self) -> int | float | None:
        """The last value of the sweep, where arms are compared; ``None`` without a sweep."""
        return self.study.sweep_values[-1]

    def of(self, arm: str, value: int | float | None) -> list[dict[str, Any]]:
        """Return the results of one cell, one a seed.

        Args:
            arm: Its name.
            value: Of the sweep.
        """
        return [result for result in self.results if result["arm"] == arm and result["value"] == value]

    def by_seed(self, arm: str, value: int | float | None, key: str) -> dict[int, float]:
        """Return a final figure of every seed that has it.

        Args:
            arm: Its name.
            value: Of the sweep.
            key: Of the figure; ``TEST: key`` for one of other data.
        """
        found = {}
        for result in self.of(arm, value):
            tests = {f"{test}: {name}": x for test, figures in result["tests"].items() for name, x in figures.items()}
            figures = result["final"] | tests
            if key in figures:
                found[result["seed"]] = figures[key]
        return found

    def final(self, arm: str, value: int | float | None, key: str) -> Estimate | None:
        """Return a final figure over seeds, or ``None`` if no run has it.

        Args:
            arm: Its name.
            value: Of the sweep.
            key: Of the figure.
        """
        values = list(self.by_seed(arm, value, key).values())
        return estimate(values) if values else None

    def curve(self, arm: str, value: int | float | None, x: str, y: str) -> list[tuple[float, Estimate]]:
        """Return a figure on the way, over seeds.

        Args:
            arm: Its name.
            value: Of the sweep.
            x: ``steps``, ``examples``, ``tokens``, ``flops`` or ``seconds``; the mean over seeds.
            y: Key of the figure.
        """
        curves = [result["curve"] for result in self.of(arm, value)]
        found = []
        for points in zip(*curves, strict=False):
            if all(y in point["figures"] for point in points):
                across = estimate([point[x] for point in points]).mean
                found.append((across, estimate([point["figures"][y] for point in points])))
        return found


def write_plan(folder: Path, runs: dict[str, dict[str, str]], about: dict[str, Any]) -> None:
    """Note which results belong to a study as it was run last.

    Args:
        folder: Of the study.
        runs: ``file`` and ``hash`` of each run, by its label; those of helpers left out.
        about: What reports say of the whole.
    """
    write_result(folder / PLAN, {"runs": runs, "about": about}, made_for="plan")


def read_outcome(study: Study, folder: Path, *, say: Callable[[str], None]) -> Outcome:
    """Read the results of a study that was run.

    Args:
        study: With its arms.
        folder: Of the study.
        say: Hears what is damaged or outdated.

    Raises:
        ValueError: If the study was never run there, or has no result yet.
    """
    try:
        plan = read_result(folder / PLAN, made_for=None)
    except UnusableResultError as error:
        refuse("study", f"{folder / PLAN} is {error}; run the study once without --report_only.")
    if plan is None:
        refuse("study", f"{folder} holds no results of {study.name!r}; run it once without --report_only.")
    results, missing = [], []
    for label, entry in plan["runs"].items():
        try:
            result = read_result(folder / "runs" / entry["file"], made_for=entry["hash"])
        except UnusableResultError as error:
            say(f"{label}: {entry['file']} is {error}; it is left out.")
            result = None
        if result is None:
            missing.append(label)
        else:
            results.append(result)
    known = set(study.arm_names)
    results = [result for result in results if result["arm"] in known and result["value"] in study.sweep_values]
    if not results:
        refuse("study", f"{folder} holds no result of {study.name!r} yet; run it without --report_only.")
    return Outcome(study, results, missing, plan["about"])
