"""The style of all figures: colours that colour-blind readers can distinguish, each with its own marker."""

import re
from collections.abc import Sequence
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
    r"written/distance_(\d+)": "accuracy of generated tokens, {} ahead",
    r"answer/exact": "exact-match accuracy of answers",
    r"answer/tokens": "token accuracy of answers",
    r"accepted_length": "mean accepted length, tokens",
    r"decode/tokens_per_forward": "tokens per forward pass",
    r"decode/tokens_per_second": "decoded tokens per second",
    r"decode/speedup": "speed-up over plain decoding",
    r"tokens_per_second": "training tokens per second of compute",
    r"steps": "optimizer steps",
    r"examples": "training rows seen",
    r"tokens": "training tokens seen",
    r"flops": "training FLOPs",
    r"seconds": "seconds of training",
    r"computing": "seconds of compute",
    r"parameters": "parameters",
}
_SHARES = re.compile(r"(.*: )?(accuracy|top5_accuracy|answer|written)/")


def figure_style() -> AbstractContextManager[None]:
    """Return a context with the common style of figures."""
    return matplotlib.rc_context(_STYLE)


def new_figure(
    *, title: str, width: float = 6.4, height: float = 3.8, heights: Sequence[float] = (1.0,)
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure with axes stacked vertically.

    Args:
        title: Title of the figure.
        width: Width in inches.
        height: Height in inches.
        heights: Relative heights of the axes.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0])
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure, axes


def series_style(index: int) -> tuple[str, str, str]:
    """Return colour, marker and line style of a series; the first 32 series all differ.

    Args:
        index: Index of the series.
    """
    line = LINES[index // len(COLOURS) % len(LINES)]
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], line


def key_label(key: str) -> str:
    """Return the label of a metric.

    Args:
        key: Key of the metric; ``TEST: key`` for an additional evaluation.
    """
    test, _, name = key.rpartition(": ")
    for pattern, words in _LABELS.items():
        if match := re.fullmatch(pattern, name):
            return (f"{test}: " if test else "") + words.format(*match.groups())
    return key


def sentence_start(words: str) -> str:
    """Return a label with an initial capital.

    Args:
        words: The label.
    """
    return words[:1].upper() + words[1:]


def is_share(key: str) -> bool:
    """Whether a metric is a fraction, which is shown in percent.

    Args:
        key: Key of the metric.
    """
    return _SHARES.match(key) is not None


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG.

    Args:
        figure: The figure.
        path: Path without suffix.
    """
    written = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with figure_style():
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            written.append(path.with_name(path.name + suffix))
            figure.savefig(written[-1], metadata=metadata)
    return written
