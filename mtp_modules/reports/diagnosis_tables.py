"""A diagnosis as tables, for the terminal and the page."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtp_modules.reports.calibration import NUM_BINS
from mtp_modules.reports.diagnosis import Diagnosis
from mtp_modules.reports.diagnosis_verdict import verdict
from mtp_modules.reports.draft_groups import Group


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: Title of the table.
        note: Explanation of the columns.
        columns: Names of the columns.
        rows: Rows with one text per column.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def tables(found: Diagnosis) -> Iterator[TextTable]:
    """Yield the tables of a diagnosis.

    Args:
        found: The diagnosis.
    """
    yield _numbers(found)
    yield _drafts(found)
    yield _heads(found)
    if any(depth.predicted_bins for depth in found.depths):
        yield _predicted(found)
    if found.kinds:
        note = "Kind of the model's argmax token at the position of the draft."
        yield _groups(found, "Where drafts are rejected: kinds of tokens", note, found.kinds, "kind")
    note = "The argmax tokens at whose positions most drafts were rejected."
    yield _groups(found, "Where drafts are rejected: tokens", note, found.tokens, "token")
    yield _rounds("Position in the row", "Position of the token that the drafts follow.", found.positions)
    if found.columns:
        yield _rounds("Position in the line", "Tokens since the last newline.", found.columns)


def _numbers(found: Diagnosis) -> TextTable:
    best = found.forecast_best
    return TextTable(
        "Number of drafts",
        "Mean accepted length (tokens per round, the token that is always emitted included) on held-out text, greedy "
        "and sampled at temperature 1, and on generated text. The time of a round, its cost relative to plain "
        "decoding, and the speed-up: forecast for held-out text and measured on generated text. * marks the best "
        "forecast.",
        ["drafts", "greedy", "sampled", "generated", "ms", "cost", "forecast", "measured"],
        [
            [
                f"{number.num_drafts}{' *' if number is best else ''}",
                f"{number.expected_tokens:.2f}",
                f"{number.expected_sampled_tokens:.2f}",
                f"{number.measured_tokens:.2f}",
                f"{1000 * number.round_seconds:.2f}",
                f"{number.cost:.2f}",
                f"{number.forecast:.2f}x",
                f"{number.measured:.2f}x",
            ]
            for number in found.numbers
        ],
    )


def _drafts(found: Diagnosis) -> TextTable:
    return TextTable(
        "Drafts by depth",
        f"{found.rounds:,} greedy rounds on held-out text. A draft is reached if all earlier drafts were accepted; so "
        "far: the rounds in which all drafts up to this depth were accepted. 1 - TV and sampled so far: accepted and "
        "so far at temperature 1 by rejection sampling, from the distributions of model and draft. Prob.: mean "
        "probability of the greedy drafts under the draft distribution; ECE: expected calibration error, the distance "
        "between that probability and acceptance.",
        ["draft", "head", "reached", "accepted", "so far", "1 - TV", "sampled so far", "prob.", "ECE"],
        [
            [
                str(depth.depth),
                str(found.head_of(depth.depth)),
                f"{depth.reached:,}",
                f"{depth.conditional:.1%}",
                f"{depth.accepted / max(found.rounds, 1):.1%}",
                f"{depth.overlap:.1%}",
                f"{depth.sampled:.1%}",
                f"{depth.confidence:.1%}" if depth.reached else "-",
                f"{depth.calibration_error:.3f}" if depth.reached else "-",
            ]
            for depth in found.depths
        ],
    )


def _predicted(found: Diagnosis) -> TextTable:
    columns = [f"{low / NUM_BINS:.0%}-{(low + 1) / NUM_BINS:.0%}" for low in range(NUM_BINS)]
    return TextTable(
        "Predicted acceptance",
        "What the heads predict of the drafts that are reached, and how many are accepted; ECE: expected calibration "
        "error of the prediction. Then the accepted drafts of those whose prediction lies in each tenth.",
        ["draft", "accepted", "predicted", "ECE", *columns],
        [
            [
                str(depth.depth),
                f"{depth.conditional:.1%}",
                "-" if depth.predicted is None else f"{depth.predicted:.1%}",
                "-" if depth.predicted_error is None or not depth.reached else f"{depth.predicted_error:.3f}",
                *(f"{one.accepted:.0%} of {one.count:,}" if one.count else "-" for one in depth.predicted_bins),
            ]
            for depth in found.depths
        ],
    )


def _heads(found: Diagnosis) -> TextTable:
    return TextTable(
        "Accuracy of every head",
        "With teacher forcing on held-out text. Most frequent: accuracy of always predicting the most frequent token. "
        "Gradient: cosine with the gradient of head 1 in the trunk; below 0 the gradients conflict.",
        ["head", "loss, nats", "top 1", "top 5", "most frequent", "gradient", ""],
        [
            [
                str(score.horizon),
                f"{score.loss:.3f}",
                f"{score.top1:.1%}",
                f"{score.top5:.1%}",
                f"{score.most_frequent:.1%}",
                "-" if cosine is None else f"{cosine:+.2f}",
                _state(found, score.horizon),
            ]
            for score, cosine in zip(found.accuracies, found.gradient_cosines, strict=True)
        ],
    )


def _state(found: Diagnosis, horizon: int) -> str:
    if horizon in found.constant:
        return "dead"
    return "not above the baseline" if horizon in found.useless else ""


def _groups(found: Diagnosis, title: str, note: str, groups: list[Group], name: str) -> TextTable:
    rejected = max(found.rejected, 1)
    return TextTable(
        title,
        note,
        [name, "drafts", "accepted", "share of rejections"],
        [
            [group.name, f"{group.count:,}", f"{group.rate:.1%}", f"{(group.count - group.accepted) / rejected:.0%}"]
            for group in groups
        ],
    )


def _rounds(title: str, note: str, groups: list[Group]) -> TextTable:
    rows = [[group.name, f"{group.count:,}", f"{1 + group.rate:.2f}"] for group in groups]
    return TextTable(title, note, ["tokens", "rounds", "mean accepted length"], rows)


def show(found: Diagnosis, console: Console) -> None:
    """Print verdict and tables.

    Args:
        found: The diagnosis.
        console: Console to print to.
    """
    console.print(Text(found.model, style="bold"), highlight=False)
    for sentence in verdict(found):
        console.print(Text(f"- {sentence}"))
    for content in tables(found):
        table = Table(title=content.title, caption=content.note, box=box.SIMPLE_HEAD, title_justify="left")
        table.title_style, table.caption_style, table.caption_justify = "bold", "dim", "left"
        for column in content.columns:
            table.add_column(column, justify="right")
        for row in content.rows:
            table.add_row(*map(Text, row))
        console.print(table)
