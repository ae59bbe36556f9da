"""The kinds of figures of a study, by name. Each function takes the outcome and its own arguments."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from mtp_modules.core.checks import refuse
from mtp_modules.reports.look import is_share, key_label, new_figure, series_style
from mtp_modules.studies import Estimate, Outcome

MAX_LEGEND_ENTRIES = 4
"""Legends with more entries are placed to the right of the axes."""
MAX_ANNOTATED_POSITIONS = 24
"""Heat maps with at most this many positions show their numbers."""


def curves(
    outcome: Outcome,
    *,
    y: str = "loss/head_1",
    x: str = "examples",
    title: str = "Learning curves",
    arms: Sequence[str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    y_label: str | None = None,
    value: float | None = None,
) -> Figure:
    """Plot a metric against steps, examples, tokens, FLOPs or seconds of training, with 95% bands over seeds.

    Args:
        outcome: Outcome of the study.
        y: Key of the metric on the y axis.
        x: ``steps``, ``examples``, ``tokens``, ``flops`` or ``seconds``.
        title: Title of the figure.
        arms: Names of the arms; all if ``None``.
        log_x: Use a logarithmic x axis.
        log_y: Use a logarithmic y axis.
        y_label: Label of the y axis; derived from its key if ``None``.
        value: Value of the sweep; the last if ``None``.
    """
    figure, (axes,) = new_figure(title=title)
    for index, arm in _chosen(outcome, arms):
        points = outcome.curve(arm, _at(outcome, value), x, y)
        _series(axes, [point[0] for point in points], [point[1] for point in points], arm, index)
    return _finished(figure, axes, x=key_label(x), y=y, y_label=y_label, log_x=log_x, log_y=log_y)


def sweep(
    outcome: Outcome,
    *,
    y: str = "loss/head_1",
    x: str | None = None,
    title: str = "Sample efficiency",
    arms: Sequence[str] | None = None,
    log_x: bool = True,
    log_y: bool = False,
    y_label: str | None = None,
) -> Figure:
    """Plot a final metric against the values of the sweep, or against another metric at those values.

    Args:
        outcome: Outcome of a study with a sweep.
        y: Key of the metric on the y axis.
        x: Key of the metric on the x axis, such as ``tokens`` or ``flops``; the value of the sweep if ``None``.
        title: Title of the figure.
        arms: Names of the arms; all if ``None``.
        log_x: Use a logarithmic x axis.
        log_y: Use a logarithmic y axis.
        y_label: Label of the y axis; derived from its key if ``None``.

    Raises:
        ValueError: If the study has no sweep.
    """
    if outcome.study.sweep is None:
        refuse("figure 'sweep'", f"study {outcome.study.name!r} has no sweep; use 'curves', or add a sweep.")
    figure, (axes,) = new_figure(title=title)
    for index, arm in _chosen(outcome, arms):
        across, found = [], []
        for value in outcome.study.sweep.values:
            estimate = outcome.final(arm, value, y)
            place = outcome.final(arm, value, x) if x else None
            if estimate is not None and (x is None or place is not None):
                across.append(float(value) if place is None else place.mean)
                found.append(estimate)
        _series(axes, across, found, arm, index)
    label = key_label(x) if x else outcome.study.sweep.label
    _finished(figure, axes, x=label, y=y, y_label=y_label, log_x=log_x, log_y=log_y)
    if x is None and log_x:
        values = outcome.study.sweep.values
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
    return figure


def bars(
    outcome: Outcome,
    *,
    metric: str = "accuracy",
    title: str = "Accuracy of every horizon",
    arms: Sequence[str] | None = None,
    zoom: bool = False,
    value: float | None = None,
) -> Figure:
    """Plot a metric of every horizon as grouped bars, one group per horizon, with 95% intervals over seeds.

    Args:
        outcome: Outcome of the study.
        metric: ``accuracy``, ``loss``, ``bits``, ``perplexity`` or ``top5_accuracy``.
        title: Title of the figure.
        arms: Names of the arms; all if ``None``.
        zoom: Start the y axis near the smallest bar; its label then says so.
        value: Value of the sweep; the last if ``None``.
    """
    chosen, at = _chosen(outcome, arms), _at(outcome, value)
    most = max(_num_horizons(outcome, arm, at) for _, arm in chosen)
    figure, (axes,) = new_figure(title=title, width=max(6.4, 1.0 + 0.22 * most * len(chosen)))
    width, lows = 0.8 / len(chosen), []
    for place, (index, arm) in enumerate(chosen):
        for horizon in range(1, _num_horizons(outcome, arm, at) + 1):
            found = outcome.final(arm, at, f"{metric}/head_{horizon}")
            assert found is not None
            lows.append(found.low)
            axes.bar(
                horizon + (place - (len(chosen) - 1) / 2) * width,
                found.mean,
                width=0.92 * width,
                yerr=found.half or None,
                color=series_style(index)[0],
                error_kw={"linewidth": 0.9, "capsize": 2},
                label=arm if horizon == 1 else None,
            )
    axes.set_xticks(range(1, most + 1))
    axes.grid(visible=False, axis="x")
    key = f"{metric}/head_1"
    _finished(figure, axes, x="horizon (tokens ahead)", y=key, y_label=key_label(key).replace(" of horizon 1", ""))
    if zoom:
        low = max(0.0, min(lows) - 0.15 * (axes.get_ylim()[1] - min(lows)))
        axes.set_ylim(low, min(axes.get_ylim()[1], 1.0) if is_share(key) else None)
        axes.set_ylabel(f"{axes.get_ylabel()} (axis does not start at 0)")
    elif is_share(key):
        axes.set_ylim(0, 1)
    return figure


def heat_map(
    outcome: Outcome,
    *,
    title: str = "Accuracy by position and horizon",
    arms: Sequence[str] | None = None,
    value: float | None = None,
) -> Figure:
    """Plot the accuracy at every position and horizon, the mean over seeds, with one panel per arm.

    Args:
        outcome: Outcome of the study.
        title: Title of the figure.
        arms: Names of the arms; all with more than one horizon if ``None``.
        value: Value of the sweep; the last if ``None``.
    """
    at = _at(outcome, value)
    chosen = [arm for _, arm in _chosen(outcome, arms) if arms is not None or _num_horizons(outcome, arm, at) > 1]
    if not chosen:
        refuse("figure 'heat_map'", "no arm has more than one horizon; give arms.")
    heights = [0.5 + 0.3 * _num_horizons(outcome, arm, at) for arm in chosen]
    figure, panels = new_figure(title=title, height=1.0 + sum(heights), heights=heights)
    image = None
    for axes, arm in zip(panels, chosen, strict=True):
        tables = [result["positions"] for result in outcome.of(arm, at)]
        mean = np.mean([np.array(table, dtype=float) for table in tables], axis=0)
        image = axes.imshow(mean.T, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower", interpolation="none")
        axes.set_title(f"{arm}, {len(tables)} seed{'' if len(tables) == 1 else 's'}")
        axes.set_ylabel("horizon")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(mean.shape[1]), [str(h + 1) for h in range(mean.shape[1])])
        axes.grid(visible=False)
        if len(mean) <= MAX_ANNOTATED_POSITIONS:
            for (t, h), share in np.ndenumerate(mean):
                axes.text(t, h, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=_text_color(share))
    panels[-1].set_xlabel("position")
    assert image is not None
    figure.colorbar(image, ax=panels, format=PercentFormatter(1.0, decimals=0), label="accuracy")
    return figure


def distance(
    outcome: Outcome,
    *,
    title: str = "Accuracy against distance",
    arms: Sequence[str] | None = None,
    log_error: bool = False,
    value: float | None = None,
) -> Figure:
    """Plot the accuracy ``d`` tokens ahead: of the head for horizon ``d``, and of token-by-token generation.

    Solid lines are the heads. Dashed lines are greedy decoding after a held-out prompt, where the model reads its own
    tokens.

    Args:
        outcome: Outcome of a study with ``decode``.
        title: Title of the figure.
        arms: Names of the arms; all if ``None``.
        log_error: Plot the error rate on a logarithmic axis.
        value: Value of the sweep; the last if ``None``.
    """
    figure, (axes,) = new_figure(title=title)
    for index, arm in _chosen(outcome, arms):
        for prefix, line, word in (("accuracy/head_", "-", "head"), ("written/distance_", "--", "generated")):
            far: list[float] = []
            found: list[Estimate] = []
            while estimate := outcome.final(arm, _at(outcome, value), f"{prefix}{len(far) + 1}"):
                far.append(float(len(far) + 1))
                found.append(_error(estimate) if log_error else estimate)
            _series(axes, far, found, f"{arm}, {word}", index, linestyle=line)
    words = "error rate" if log_error else "accuracy"
    _finished(figure, axes, x="distance (tokens ahead)", y="accuracy/head_1", y_label=words, log_y=log_error)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def other_data(
    outcome: Outcome,
    *,
    y: str = "answer/exact",
    x: str = "test",
    title: str = "Other data",
    arms: Sequence[str] | None = None,
    trained: int | None = None,
) -> Figure:
    """Plot a metric of every test, in the order of the study, with 95% bands over seeds.

    Args:
        outcome: Outcome of a study with ``tests``; the last value of its sweep is shown.
        y: Key of the metric on the y axis.
        x: Label of the x axis, which shows the names of the tests.
        title: Title of the figure.
        arms: Names of the arms; all if ``None``.
        trained: Number of tests, from the first, that are in distribution; a line marks the last of them.

    Raises:
        ValueError: If the study has no tests.
    """
    names = list(outcome.study.cells()[0].tests)
    if not names:
        refuse("figure 'tests'", f"study {outcome.study.name!r} has no tests; use 'curves', or add tests.")
    figure, (axes,) = new_figure(title=title)
    for index, arm in _chosen(outcome, arms):
        found = [outcome.final(arm, outcome.last_value, f"{name}: {y}") for name in names]
        known = [(float(place), estimate) for place, estimate in enumerate(found) if estimate is not None]
        _series(axes, [place for place, _ in known], [estimate for _, estimate in known], arm, index)
    if trained is not None:
        axes.axvline(trained - 0.5, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(names)), names)
    return _finished(figure, axes, x=x, y=y)


KINDS: dict[str, Callable[..., Figure]] = {
    "curves": curves,
    "sweep": sweep,
    "bars": bars,
    "heat_map": heat_map,
    "distance": distance,
    "tests": other_data,
}


def _chosen(outcome: Outcome, arms: Sequence[str] | None) -> list[tuple[int, str]]:
    """Return the arms to plot, each with its index among all arms, which determines its colour."""
    return [(index, arm) for index, arm in enumerate(outcome.arms) if arms is None or arm in arms]


def _at(outcome: Outcome, value: float | None) -> float | None:
    """Return the value of the sweep to plot."""
    return outcome.last_value if value is None else value


def _num_horizons(outcome: Outcome, arm: str, value: float | None) -> int:
    results = outcome.of(arm, value)
    return sum(key.startswith("loss/head_") for key in results[0]["final"]) if results else 0


def _series(
    axes: Axes, x: Sequence[float], found: Sequence[Estimate], label: str, index: int, linestyle: str | None = None
) -> None:
    if not found:
        return  # no run of this arm has the metric
    colour, marker, line = series_style(index)
    means = [estimate.mean for estimate in found]
    axes.plot(x, means, label=label, color=colour, marker=marker, linestyle=linestyle or line)
    if any(estimate.half for estimate in found):
        lows, highs = [estimate.low for estimate in found], [estimate.high for estimate in found]
        axes.fill_between(x, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _finished(
    figure: Figure, axes: Axes, *, x: str, y: str, y_label: str | None = None, log_x: bool = False, log_y: bool = False
) -> Figure:
    axes.set_xlabel(x)
    axes.set_ylabel(y_label or key_label(y))
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if log_y:
        axes.set_yscale("log")
    if is_share(y):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        if not log_y:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > MAX_LEGEND_ENTRIES:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.set_figwidth(figure.get_figwidth() + 1.8)
    elif len(handles) > 1:
        axes.legend()
    return figure


def _error(found: Estimate) -> Estimate:
    return Estimate(max(1 - found.mean, 1e-4), found.half, found.n)


def _text_color(share: float) -> str:
    return "white" if math.isnan(share) or share < 0.6 else "black"
