"""``python -m mtp_modules study``: run a study and write its report."""

import importlib.util
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mtp_modules.core.checks import refuse
from mtp_modules.studies import Study, StudyStoppedError, load_study, read_outcome, run_study, shipped


def study(
    name: str | None = None,
    seeds: int | None = None,
    budget: float | None = None,
    output: str = "runs/studies",
    workers: int | None = None,
    report_only: bool = False,
) -> None:
    """Answer a question about multi-token prediction by training runs, with figures, tables and a report.

    Results of finished runs are kept. To resume an interrupted study, start it again with the same options.

    Args:
        name: Name of a study of this package, or the path of a YAML file; lists the studies if null.
        seeds: Number of runs of each arm; that of the study if null.
        budget: Minutes for all runs, whose lengths are scaled to fit; that of the study if null.
        output: Folder for results; the study creates a subfolder with its name.
        workers: Number of parallel runs; if null, one per GPU, or one per core without a GPU.
        report_only: Write the report again from existing results, without training.
    """
    if name is None:
        _list()
        return
    if importlib.util.find_spec("matplotlib") is None:
        refuse("study", "figures need matplotlib; install it with: pip install 'mtp_modules[studies]'.")
    from mtp_modules.reports.requests import check_keys, check_requests
    from mtp_modules.reports.study_page import write_report

    specification = load_study(name)
    check_requests(specification)
    folder = Path(output) / specification.name
    failed: dict[str, str] = {}
    if not report_only:
        try:
            _, failed = run_study(
                specification,
                folder=folder,
                seeds=seeds,
                minutes=budget,
                workers=workers,
                check=lambda keys: check_keys(specification, keys),
            )
        except StudyStoppedError as stopped:
            print("Stopped. Finished runs are kept; the same command resumes the study.", file=sys.stderr)
            sys.exit(128 + stopped.received)
    outcome = read_outcome(specification, folder, say=print)
    page = write_report(outcome, folder, _command(specification, name, outcome.about))
    print((folder / "verdict.md").read_text(encoding="utf-8"), end="")
    print(f"Report: {page}")
    if failed:
        label, why = next(iter(failed.items()))
        refuse("study", f"{len(failed)} of the runs failed and are missing; the first, {label}: {why.splitlines()[-1]}")


def _list() -> None:
    table = Table(title="Studies: python -m mtp_modules study NAME")
    for column in ("name", "question", "runs", "budget"):
        table.add_column(column)
    for name in shipped():
        found = load_study(name)
        runs = (len(found.cells()) + len(found.helper_cells())) * found.seeds
        limit = "none" if found.minutes is None else f"{found.minutes:g} min"
        table.add_row(name, found.question, str(runs), limit)
    Console().print(table)


def _command(specification: Study, name: str, about: dict[str, object]) -> str:
    """Return the command that reproduces the results."""
    budget = "" if about["minutes"] in (None, specification.minutes) else f" --budget {about['minutes']:g}"
    return f"python -m mtp_modules study {shlex.quote(name)} --seeds {about['seeds']}{budget}"
