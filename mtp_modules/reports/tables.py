"""Kinds of tables that a study can ask for by name, and how tables are written."""

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
    """A column.

    Attributes:
        title: Above it.
        key: Of the figure, which decides how numbers are written.
    """

    title: str
    key: str = ""


@dataclass(frozen=True)
class Table:
    """Entries in rows. Estimates are written with their intervals.

    Attributes:
        title: Above it.
        columns: From the left.
        rows: One entry a column.
    """

    title: str
    columns: list[Column]
    rows: list[list[Entry]]

    def text(self) -> list[list[str]]:
        """Return all entries as words and numbers."""
        pairs = [zip(row, self.columns, strict=True) for row in self.rows]
        return [[show(entry, column.key) for entry, column in row] for row in pairs]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [" | ".join(column.title for column in self.columns), "|".join(["---"] * len(self.columns))]
        lines += [" | ".join(row) for row in self.text()]
        return "\n".join(f"| {line} |" for line in lines) + "\n"

    def html(self) -> str:
        """Return it as HTML."""
        return html_table([column.title for column in self.columns], self.text())

    def csv(self) -> str:
        """Return it as CSV: plain numbers, and for each estimate the ends of its interval and the number of seeds."""
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
    """List final figures of every arm.

    Args:
        outcome: Of the study.
        columns: Keys of the figures.
        title: Above it.
        arms: Which; all if ``None``.
        every_value: One row a value of the sweep, instead of the last value only.
        changes: Say how many lines of configuration make an arm of the base; see :meth:`Study.changed_lines`.
    """
    given = outcome.study.sweep
    values = outcome.study.sweep_values if every_value else [outcome.last_value]
    head = [Column("arm"), *([Column(given.label)] if given is not None and every_value else ())]
    head += [Column("lines of change")] if changes else []
    rows: list[list[Entry]] = []
    for arm in outcome.arms if arms is None else arms:
        for value in values:
            place: list[Entry] = [f"{value:g}"] if given is not None and every_value and value is not None else []
            place += [str(outcome.study.changed_lines(arm))] if changes else []
            rows.append([arm, *place, *(outcome.final(arm, value, key) for key in columns)])
    return Table(title, [*head, *(Column(key_label(key), key) for key in columns)], rows)


def across(outcome: Outcome, *, key: str, title: str | None = None, arms: Sequence[str] | None = None) -> Table:
    """List one final figure of every arm at every value of the sweep, a column a value.

    Args:
        outcome: Of a study with a sweep.
        key: Of the figure.
        title: Above it; what the key means if ``None``.
        arms: Which; all if ``None``.

    Raises:
        ValueError: If the study has no sweep.
    """
    if outcome.study.sweep is None:
        refuse("table 'across'", f"study {outcome.study.name!r} has no sweep; take 'results', or give it one.")
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
    """List how much every arm needs to reach a level, as a multiple of what the first arm needs.

    Args:
        outcome: Of a study with a sweep.
        key: Of the figure that must reach the level.
        x: Key of what is needed, such as ``tokens`` or ``flops``; ``value`` for the value of the sweep.
        target: The level; see :func:`~mtp_modules.reports.needed.needed`.
        title: Above it.
    """
    rows: list[list[Entry]] = [
        [arm, needed(outcome, arm, key=key, x=x, target=target).words] for arm in outcome.arms[1:]
    ]
    what = "times what " + outcome.arms[0] + " needs"
    return Table(title, [Column("arm"), Column(what)], rows)


KINDS: dict[str, Callable[..., Table]] = {"results": results, "across": across, "data_needed": data_needed}


def show(entry: Entry, key: str) -> str:
    """Return an entry as it stands in a table.

    Args:
        entry: Of the table.
        key: Of the figure.
    """
    if entry is None:
        return "-"
    if isinstance(entry, str):
        return entry
    half = "" if not entry.half else f" ± {number(entry.half, key, precise_to=entry.half)}"
    return f"{number(entry.mean, key, precise_to=entry.half)}{half}"


def number(value: float, key: str, *, precise_to: float | None = None) -> str:
    """Return a number as people write it: shares in percent, counts with a prefix, others with about four digits.

    Args:
        value: To be written.
        key: Of the figure.
        precise_to: Its uncertainty, of which two digits are kept.
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
