"""A diagnosis as tables: the same for a terminal and for a page."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtp_modules.reports.diagnosis import Diagnosis
from mtp_modules.reports.diagnosis_verdict import verdict
from mtp_modules.reports.draft_groups import Group


@dataclass(frozen=True)
class Figures:
    """A table of texts.

    Attributes:
        title: What it is about.
        note: How to read it.
        columns: Their names.
        rows: One text a column.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def tables(found: Diagnosis) -> Iterator[Figures]:
    """Yield the tables of a diagnosis.

    Args:
        found: What was measured.
    """
    yield _numbers(found)
    yield _drafts(found)
    yield _heads(found)
    if found.kinds:
        note = "Kind of the token that the model itself chose in the draft's place."
        yield _groups(found, "Where drafts fail: kinds of tokens", note, found.kinds, "kind")
    note = "The tokens in whose place most drafts were rejected."
    yield _groups(found, "Where drafts fail: tokens", note, found.tokens, "token")
    yield _rounds("Place in the row", "Where in the row of text the drafts begin.", found.places)
    if found.columns:
        yield _rounds("Place in the line", "Tokens since the last line end.", found.columns)


def _numbers(found: Diagnosis) -> Figures:
    best = found.forecast_best
    return Figures(
        "How many drafts",
        "Tokens a round brings on held-out text (greedy; drawn at temperature 1) and on the model's own text, the time "
        "of a round, its cost over plain decoding, and the speed-up that makes. * is the best forecast.",
        ["drafts", "greedy", "drawn", "own text", "ms", "cost", "forecast", "measured"],
        [
            [
                f"{number.num_drafts}{' *' if number is best else ''}",
                f"{number.expected_tokens:.2f}",
                f"{number.expected_drawn_tokens:.2f}",
                f"{number.measured_tokens:.2f}",
                f"{1000 * number.round_seconds:.2f}",
                f"{number.cost:.2f}",
                f"{number.forecast:.2f}x",
                f"{number.measured:.2f}x",
            ]
            for number in found.numbers
        ],
    )


def _drafts(found: Diagnosis) -> Figures:
    return Figures(
        "Drafts by depth",
        f"{found.rounds:,} greedy rounds on held-out text. A draft is reached if all before it were accepted; so far: "
        "all drafts up to here were. 1 - TV and drawn so far: accepted and so far at temperature 1 by rejection "
        "sampling, from the laws of model and draft. Prob.: mean probability of the greedy drafts by their own law; "
        "ECE: expected calibration error, how far that is from being accepted.",
        ["draft", "head", "reached", "accepted", "so far", "1 - TV", "drawn so far", "prob.", "ECE"],
        [
            [
                str(depth.depth),
                str(found.head_of(depth.depth)),
                f"{depth.reached:,}",
                f"{depth.conditional:.1%}",
                f"{depth.accepted / max(found.rounds, 1):.1%}",
                f"{depth.overlap:.1%}",
                f"{depth.drawn:.1%}",
                f"{depth.confidence:.1%}" if depth.reached else "-",
                f"{depth.calibration_error:.3f}" if depth.reached else "-",
            ]
            for depth in found.depths
        ],
    )


def _heads(found: Diagnosis) -> Figures:
    return Figures(
        "Heads against the text",
        "Given the true tokens between. Commonest: what always saying the commonest token would get. Gradient: cosine "
        "in the trunk with head 1's; below 0 they pull against each other.",
        ["head", "loss, nats", "top 1", "top 5", "commonest", "gradient", ""],
        [
            [
                str(score.horizon),
                f"{score.loss:.3f}",
                f"{score.top1:.1%}",
                f"{score.top5:.1%}",
                f"{score.commonest:.1%}",
                "-" if cosine is None else f"{cosine:+.2f}",
                _state(found, score.horizon),
            ]
            for score, cosine in zip(found.accuracies, found.gradient_cosines, strict=True)
        ],
    )


def _state(found: Diagnosis, horizon: int) -> str:
    if horizon in found.silent:
        return "dead"
    return "no better than a guess" if horizon in found.useless else ""


def _groups(found: Diagnosis, title: str, note: str, groups: list[Group], name: str) -> Figures:
    rejected = max(found.rejected, 1)
    return Figures(
        title,
        note,
        [name, "drafts", "accepted", "share of rejections"],
        [
            [group.name, f"{group.count:,}", f"{group.rate:.1%}", f"{(group.count - group.accepted) / rejected:.0%}"]
            for group in groups
        ],
    )


def _rounds(title: str, note: str, groups: list[Group]) -> Figures:
    rows = [[group.name, f"{group.count:,}", f"{1 + group.rate:.2f}"] for group in groups]
    return Figures(title, note, ["tokens", "rounds", "tokens a round"], rows)


def show(found: Diagnosis, console: Console) -> None:
    """Print verdict and tables.

    Args:
        found: What was measured.
        console: Where to.
    """
    console.print(Text(found.model, style="bold"), highlight=False)
    for sentence in verdict(found):
        console.print(Text(f"- {sentence}"))
    for figures in tables(found):
        table = Table(title=figures.title, caption=figures.note, box=box.SIMPLE_HEAD, title_justify="left")
        table.title_style, table.caption_style, table.caption_justify = "bold", "dim", "left"
        for column in figures.columns:
            table.add_column(column, justify="right")
        for row in figures.rows:
            table.add_row(*map(Text, row))
        console.print(table)
