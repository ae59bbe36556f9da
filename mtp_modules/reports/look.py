"""One look for every figure: colours that colour-blind readers can tell apart, and a marker beside each colour."""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
"""Okabe and Ito's palette, without its yellow, which is hard to see on white."""
MARKERS = "os^Dv*PX"
LINES = ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.dpi": 130,
    "svg.hashsalt": "mtp_modules",
}

_LABELS = {
    r"loss/head_(\d+)": "loss of horizon {}, nats",
    r"bits/head_(\d+)": "bits per token, horizon {}",
    r"perplexity/head_(\d+)": "perplexity of horizon {}",
    r"accuracy/head_(\d+)": "accuracy of horizon {}",
    r"top5_accuracy/head_(\d+)": "top-5 accuracy of horizon {}",
    r"written/distance_(\d+)": "written right, {} ahead",
    r"answer/exact": "answers that are right as a whole",
    r"answer/tokens": "answer tokens that are right",
    r"accepted_length": "tokens a verification brings",
    r"decode/tokens_per_forward": "tokens a forward pass",
    r"decode/tokens_per_second": "decoded tokens a second",
    r"decode/speedup": "speed-up over plain decoding",
    r"tokens_per_second": "trained tokens a second",
    r"steps": "optimizer steps",
    r"examples": "training rows seen",
    r"tokens": "training tokens seen",
    r"flops": "training FLOPs",
    r"seconds": "seconds of training",
    r"computing": "seconds of computing",
    r"parameters": "parameters",
}
_SHARES = re.compile(r"(.*: )?(accuracy|top5_accuracy|answer|written)/")


def our_look() -> AbstractContextManager[None]:
    """Return a context in which everything is drawn alike."""
    return matplotlib.rc_context(_STYLE)


def new_figure(*, title: str, width: float = 6.4, height: float = 3.8, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure with axes side by side.

    Args:
        title: Above it.
        width: In inches.
        height: In inches.
        columns: How many axes.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure, axes


def series_style(index: int) -> tuple[str, str, str]:
    """Return colour, marker and line of a series; no two of the first 32 are alike.

    Args:
        index: Which series.
    """
    line = LINES[index // len(COLOURS) % len(LINES)]
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], line


def key_label(key: str) -> str:
    """Return what a key means, in words.

    Args:
        key: Of a figure; ``TEST: key`` for one of other data.
    """
    test, _, name = key.rpartition(": ")
    for pattern, words in _LABELS.items():
        if match := re.fullmatch(pattern, name):
            return (f"{test}: " if test else "") + words.format(*match.groups())
    return key


def is_share(key: str) -> bool:
    """Whether a figure is a share, which is shown in percent.

    Args:
        key: Of the figure.
    """
    return _SHARES.match(key) is not None


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG.

    Args:
        figure: To be drawn.
        path: Without suffix.
    """
    written = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with our_look():
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            written.append(path.with_name(path.name + suffix))
            figure.savefig(written[-1], metadata=metadata)
    return written
