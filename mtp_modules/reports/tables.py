"""The kinds of tables of a study, by name, and the formatting of tables."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtp_modules.core.checks import refuse
from mtp_modules.reports.look import is_share, key_label
from mtp_modules.reports.needed import needed
from mtp_modules.reports.page import html_table
from mtp_modules.studies import Estimate, Outcome

Entry = str | Estimate | None
_COUNTS = ("parameters", "flops", "tokens", "examples", "steps", "tokens_per_second", "decode/tokens_per_second")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Header of the column.
        key: Key of the metric, which determines the number format.
    """

    title: str
    key: str = ""


@dataclass(frozen=True)
class Table:
    """A table. Estimates are shown with their intervals.

    Attributes:
        title: Title of the table.
        columns: Columns from left to right.
        rows: Rows with one entry per column.
    """

    title: str
    columns: list[Column]
    rows: list[list[Entry]]

    def text(self) -> list[list[str]]:
        """Return all entries as text."""
        pairs = [zip(row, self.columns, strict=True) for row in self.rows]
        return [[show(entry, column.key) for entry, column in row] for row in pairs]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [" | ".join(column.title for column in self.columns), "|".join(["---"] * len(self.columns))]
        lines += [" | ".join(row) for row in self.text()]
        return "\n".join(f"| {line} |" for line in lines) + "\n"

    def html(self) -> str:
        """Return the table as HTML."""
        return html_table([column.title for column in self.columns], self.text())

    def csv(self) -> str:
        """Return the table as CSV: plain numbers; each estimate has its interval and the number of seeds."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        estimated = [any(isinstance(row[index], Estimate) for row in self.rows) for index in range(len(self.columns))]
        titles: list[str] = []
        for column, several in zip(self.columns, estimated, strict=True):
            titles += [column.title, *((f"{column.title} {part}" for part in ("low", "high", "n")) if several else ())]
        writer.writerow(titles)
        for row in self.rows:
            line: list[object] = []
            for entry, several in zip(row, estimated, strict=True):
                if isinstance(entry, Estimate):
                    ends = ("", "") if entry.half is None else (entry.low, entry.high)
                    line += [entry.mean, *ends, entry.n]
                else:
                    line += [entry or "", *([""] * 3 if several else ())]
            writer.writerow(line)
        return out.getvalue()


def results(
    outcome: Outcome,
    *,
    columns: Sequence[str],
    title: str = "Results",
    arms: Sequence[str] | None = None,
    every_value: bool = False,
    changes: bool = False,
) -> Table:
    """List final metrics of every arm.

    Args:
        outcome: Outcome of the study.
        columns: Keys of the metrics.
        title: Title of the table.
        arms: Names of the arms; all if ``None``.
        every_value: One row for each value of the sweep, instead of the last value only.
        changes: Add the number of YAML lines by which an arm differs from the base; see :meth:`Study.changed_lines`.
    """
    given = outcome.study.sweep
    values = outcome.study.sweep_values if every_value else [outcome.last_value]
    head = [Column("arm"), *([Column(given.label)] if given is not None and every_value else ())]
    head += [Column("changed lines")] if changes else []
    rows: list[list[Entry]] = []
    for arm in outcome.arms if arms is None else arms:
        for value in values:
            place: list[Entry] = [f"{value:g}"] if given is not None and every_value and value is not None else []
            place += [str(outcome.study.changed_lines(arm))] if changes else []
            rows.append([arm, *place, *(outcome.final(arm, value, key) for key in columns)])
    return Table(title, [*head, *(Column(key_label(key), key) for key in columns)], rows)


def across(outcome: Outcome, *, key: str, title: str | None = None, arms: Sequence[str] | None = None) -> Table:
    """List a final metric of every arm, with one column for each value of the sweep.

    Args:
        outcome: Outcome of a study with a sweep.
        key: Key of the metric.
        title: Title of the table; the label of the metric if ``None``.
        arms: Names of the arms; all if ``None``.

    Raises:
        ValueError: If the study has no sweep.
    """
    if outcome.study.sweep is None:
        refuse("table 'across'", f"study {outcome.study.name!r} has no sweep; use 'results', or add a sweep.")
    values = outcome.study.sweep.values
    head = [Column(f"arm \\ {outcome.study.sweep.label}"), *(Column(f"{value:g}", key) for value in values)]
    rows: list[list[Entry]] = [
        [arm, *(outcome.final(arm, value, key) for value in values)] for arm in (outcome.arms if arms is None else arms)
    ]
    return Table(title or key_label(key), head, rows)


def data_needed(
    outcome: Outcome,
    *,
    key: str = "loss/head_1",
    x: str = "tokens",
    target: float | None = None,
    title: str = "Data needed for the same result",
) -> Table:
    """List how much every arm needs to reach a level, relative to the first arm.

    Args:
        outcome: Outcome of a study with a sweep.
        key: Key of the metric that must reach the level.
        x: Key of the required quantity, such as ``tokens`` or ``flops``; ``value`` for the value of the sweep.
        target: Level to reach; see :func:`~mtp_modules.reports.needed.needed`.
        title: Title of the table.
    """
    rows: list[list[Entry]] = [
        [arm, needed(outcome, arm, key=key, x=x, target=target).words] for arm in outcome.arms[1:]
    ]
    what = "relative to " + outcome.arms[0]
    return Table(title, [Column("arm"), Column(what)], rows)


KINDS: dict[str, Callable[..., Table]] = {"results": results, "across": across, "data_needed": data_needed}


def show(entry: Entry, key: str) -> str:
    """Return an entry of a table as text.

    Args:
        entry: The entry.
        key: Key of the metric.
    """
    if entry is None:
        return "-"
    if isinstance(entry, str):
        return entry
    half = "" if not entry.half else f" ± {number(entry.half, key, precise_to=entry.half)}"
    return f"{number(entry.mean, key, precise_to=entry.half)}{half}"


def number(value: float, key: str, *, precise_to: float | None = None) -> str:
    """Return a number as text: fractions in percent, counts with a unit prefix, others with about four digits.

    Args:
        value: The number.
        key: Key of the metric.
        precise_to: Uncertainty of the number; two of its digits are shown.
    """
    if key.rpartition(": ")[2] in _COUNTS:
        for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{letter}"
        return f"{value:.4g}"
    unit, sign = (100, "%") if is_share(key) else (1, "")
    if precise_to:
        decimals = min(max(1 - math.floor(math.log10(unit * precise_to)), 0), 6)
        return f"{unit * value:.{decimals}f}{sign}"
    return f"{100 * value:.1f}%" if sign else f"{value:.4g}"
