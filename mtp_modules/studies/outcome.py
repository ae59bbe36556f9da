"""All results of a study, with the queries that reports need."""

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
    """Results of the arms, without those of helpers.

    Attributes:
        study: The study.
        results: Contents of the result files, in order of arm, value and seed.
        missing: Labels of runs without a result.
        about: ``seeds``, ``minutes``, ``scale`` and ``workers`` of the last run of the study.
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
        """The last value of the sweep, at which arms are compared; ``None`` without a sweep."""
        return self.study.sweep_values[-1]

    def of(self, arm: str, value: int | float | None) -> list[dict[str, Any]]:
        """Return the results of one cell, one per seed.

        Args:
            arm: Name of the arm.
            value: Value of the sweep.
        """
        return [result for result in self.results if result["arm"] == arm and result["value"] == value]

    def by_seed(self, arm: str, value: int | float | None, key: str) -> dict[int, float]:
        """Return a final metric of every seed that has it.

        Args:
            arm: Name of the arm.
            value: Value of the sweep.
            key: Key of the metric; ``TEST: key`` for an additional evaluation.
        """
        found = {}
        for result in self.of(arm, value):
            tests = {f"{test}: {name}": x for test, figures in result["tests"].items() for name, x in figures.items()}
            figures = result["final"] | tests
            if key in figures:
                found[result["seed"]] = figures[key]
        return found

    def final(self, arm: str, value: int | float | None, key: str) -> Estimate | None:
        """Return the estimate of a final metric over seeds, or ``None`` if no run has it.

        Args:
            arm: Name of the arm.
            value: Value of the sweep.
            key: Key of the metric.
        """
        values = list(self.by_seed(arm, value, key).values())
        return estimate(values) if values else None

    def curve(self, arm: str, value: int | float | None, x: str, y: str) -> list[tuple[float, Estimate]]:
        """Return the curve of a metric during training, over seeds.

        Args:
            arm: Name of the arm.
            value: Value of the sweep.
            x: ``steps``, ``examples``, ``tokens``, ``flops`` or ``seconds``; the mean over seeds.
            y: Key of the metric.
        """
        curves = [result["curve"] for result in self.of(arm, value)]
        found = []
        for points in zip(*curves, strict=False):
            if all(y in point["figures"] for point in points):
                across = estimate([point[x] for point in points]).mean
                found.append((across, estimate([point["figures"][y] for point in points])))
        return found


def write_plan(folder: Path, runs: dict[str, dict[str, str]], about: dict[str, Any]) -> None:
    """Record which results belong to the last run of a study.

    Args:
        folder: Folder of the study.
        runs: ``file`` and ``hash`` of each run by label, without helpers.
        about: Settings of the study for reports.
    """
    write_result(folder / PLAN, {"runs": runs, "about": about}, made_for="plan")


def read_outcome(study: Study, folder: Path, *, say: Callable[[str], None]) -> Outcome:
    """Read the results of a study.

    Args:
        study: The study.
        folder: Folder of the study.
        say: Called with a message for each damaged or outdated file.

    Raises:
        ValueError: If the folder holds no plan or no result of the study.
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
            say(f"{label}: {entry['file']} is {error}; the report omits it.")
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
