"""The figures, tables and verdicts that a study's YAML requests: checked before training, created after it."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from matplotlib.figure import Figure

from mtp_modules.core.checks import refuse
from mtp_modules.reports import figures, study_verdicts, tables
from mtp_modules.reports.look import figure_style
from mtp_modules.reports.tables import Table
from mtp_modules.studies import Outcome, Study

_T = TypeVar("_T")

ALWAYS = ("steps", "examples", "tokens", "flops", "seconds", "computing", "parameters", "tokens_per_second")
"""Metrics that every run has in addition to those of its evaluation."""
SPEED = ("decode/tokens_per_forward", "decode/tokens_per_second", "decode/speedup")


def check_requests(study: Study) -> None:
    """Check that the requested figures, tables and verdicts exist and their arguments are valid.

    Args:
        study: The study.

    Raises:
        ValueError: If a kind, an argument or an arm is unknown, or an argument is missing.
    """
    arms = study.arm_names
    groups: tuple[tuple[str, list[dict[str, Any]], Mapping[str, Callable[..., Any]]], ...] = (
        ("figure", study.figures, figures.KINDS),
        ("table", study.tables, tables.KINDS),
        ("verdict", study.verdicts, study_verdicts.KINDS),
    )
    for word, requests, kinds in groups:
        for request in requests:
            kind = str(request.get("kind"))
            if kind not in kinds:
                refuse(study.name, f"there is no {word} of kind {kind!r}. Known: {', '.join(kinds)}.")
            known = [name for name in inspect.signature(kinds[kind]).parameters if name != "outcome"]
            for name in request.keys() - {"kind", *known}:
                refuse(study.name, f"{word} {kind!r} has no argument {name!r}. Known: {', '.join(known)}.")
            for name, parameter in inspect.signature(kinds[kind]).parameters.items():
                if parameter.default is inspect.Parameter.empty and name not in {"outcome", *request}:
                    refuse(study.name, f"{word} {kind!r} needs the argument {name!r}.")
            if request.get("value") is not None and request["value"] not in study.sweep_values:
                given = ", ".join(f"{value}" for value in study.sweep_values if value is not None) or "none"
                refuse(study.name, f"{word} {kind!r} has no value {request['value']!r}. Values of the sweep: {given}.")
            for arm in [*request.get("arms", ()), *(request[name] for name in ("arm", "to") if name in request)]:
                if arm not in arms:
                    refuse(study.name, f"{word} {kind!r} names arm {arm!r}. Known: {', '.join(arms)}.")


def check_keys(study: Study, keys: set[str]) -> None:
    """Check that the runs of a study produce all metrics that its figures, tables and verdicts need.

    Args:
        study: The study.
        keys: Keys of the metrics of its arms' evaluations.

    Raises:
        ValueError: If a figure, table or verdict needs another metric.
    """
    known = keys | set(ALWAYS)
    known |= {f"{test}: {key}" for test in study.cells()[0].tests for key in keys}
    if study.decode is not None:
        known |= {f"written/distance_{index + 1}" for index in range(study.decode.distances)}
        known |= set(SPEED) if study.decode.new_tokens else set()
    for request in [*study.figures, *study.tables, *study.verdicts]:
        names = ("key", "y") if request["kind"] == "tests" else ("key", "y", "x")
        requested = [request[name] for name in names if request.get(name) is not None]
        for key in [*requested, *request.get("columns", ())]:
            if key not in known and key != "value":
                shown = ", ".join(sorted(re.sub(r"_\d+$", "_1", name) for name in known))
                refuse(study.name, f"{request['kind']!r} needs {key!r}, which no run produces. Known: {shown}.")


def create_figures(outcome: Outcome) -> list[tuple[str, Figure]]:
    """Return every figure with its file name.

    Args:
        outcome: Outcome of the study.
    """
    found = []
    for index, request in enumerate(outcome.study.figures):
        name = f"{index + 1}-{request['kind']}"
        with figure_style():
            found.append((name, _create(figures.KINDS, request, outcome)))
    return found


def create_tables(outcome: Outcome) -> list[tuple[str, Table]]:
    """Return every table with its file name.

    Args:
        outcome: Outcome of the study.
    """
    requests = outcome.study.tables
    return [(f"{i + 1}-{one['kind']}", _create(tables.KINDS, one, outcome)) for i, one in enumerate(requests)]


def create_verdicts(outcome: Outcome) -> list[str]:
    """Return every verdict as a sentence.

    Args:
        outcome: Outcome of the study.
    """
    return [_create(study_verdicts.KINDS, request, outcome) for request in outcome.study.verdicts]


def _create(kinds: Mapping[str, Callable[..., _T]], request: dict[str, Any], outcome: Outcome) -> _T:
    arguments = {name: value for name, value in request.items() if name != "kind"}
    return kinds[request["kind"]](outcome, **arguments)
