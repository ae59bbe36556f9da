"""Small charts as inline SVG, in the colours of the page's style."""

from collections.abc import Sequence
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 14, 38


def _axes(width: int, height: int, top: float, ticks: Sequence[float], percent: bool, label: str) -> str:
    parts = []
    for tick in ticks:
        y = _y(tick, top, height)
        text = f"{tick:.0%}" if percent else f"{tick:g}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text class="soft" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text class="soft" x="{middle:.0f}" y="{height - 5}" text-anchor="middle">{escape(label)}</text>')
    return "".join(parts)


def _y(value: float, top: float, height: int) -> float:
    return height - _BOTTOM - value / top * (height - _TOP - _BOTTOM)


def _svg(width: int, height: int, name: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(name)}">{body}</svg>'
    )


def _legend(names: Sequence[str], colours: Sequence[str]) -> str:
    items = "".join(
        f'<span class="key"><span style="background:{colour}"></span>{escape(name)}</span>'
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<div class="legend">{items}</div>'


COLOURS = ("var(--accent)", "var(--second)", "var(--third)")


def bars(name: str, label: str, names: Sequence[str], series: dict[str, Sequence[float]], *, percent: bool) -> str:
    """Return a chart of grouped bars with a legend.

    Args:
        name: Description of the chart for screen readers.
        label: Label of the x axis.
        names: Names of the groups.
        series: One value per group, by name of the series.
        percent: Whether values are fractions; the axis then ends at 1.
    """
    top, ticks = (1.0, (0, 0.25, 0.5, 0.75, 1)) if percent else _scale(series)
    each = {1: 60, 2: 56}.get(len(series), 18 * len(series))
    width, height = _LEFT + _RIGHT + max(len(names) * each, 220), 230
    step = (width - _LEFT - _RIGHT) / len(names)
    thick = min(34.0, step * 0.8 / len(series))
    parts = [_axes(width, height, top, ticks, percent, label)]
    for place, group in enumerate(names):
        centre = _LEFT + step * (place + 0.5)
        for index, values in enumerate(series.values()):
            x = centre + (index - len(series) / 2) * thick
            y, value = _y(values[place], top, height), values[place]
            text = f"{value:.0%}" if percent else f"{value:.2f}"
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{thick - 2:.1f}" height="{height - _BOTTOM - y:.1f}" rx="2" '
                f'fill="{COLOURS[index]}"><title>{escape(group)}: {text}</title></rect>'
            )
            if len(series) < 3:
                parts.append(
                    f'<text x="{x + thick / 2:.1f}" y="{y - 3:.1f}" text-anchor="middle" font-size="10.5">{text}</text>'
                )
        parts.append(f'<text x="{centre:.1f}" y="{height - _BOTTOM + 15}" text-anchor="middle">{escape(group)}</text>')
    key = _legend(list(series), COLOURS[: len(series)]) if len(series) > 1 else ""
    return key + _svg(width, height, name, "".join(parts))


def _scale(series: dict[str, Sequence[float]]) -> tuple[float, tuple[float, ...]]:
    largest = max(max(values) for values in series.values())
    step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 25, 100, 1000) if largest / step <= 6)
    count = int(largest / step) + 1
    return count * step, tuple(step * index for index in range(count + 1))


def lines(name: str, label: str, names: Sequence[str], series: dict[str, Sequence[float]], *, marked: int) -> str:
    """Return a line chart with a legend.

    Args:
        name: Description of the chart for screen readers.
        label: Label of the x axis.
        names: Tick labels of the x axis.
        series: One value per tick, by name of the series.
        marked: Index of the tick to mark.
    """
    top, ticks = _scale(series)
    width, height = 460, 260
    step = (width - _LEFT - _RIGHT) / max(len(names) - 1, 1)
    parts = [_axes(width, height, top, ticks, False, label)]
    x = _LEFT + step * marked
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" stroke="var(--accent)" '
        'stroke-dasharray="3 4"/>'
    )
    for index, (which, values) in enumerate(series.items()):
        points = [(_LEFT + step * place, _y(value, top, height), value) for place, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        dash = ' stroke-dasharray="6 4"' if index else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[index]}" stroke-width="2.5"{dash}/>')
        for place, (x, y, value) in enumerate(points):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[index]}">'
                f"<title>{escape(names[place])}, {escape(which)}: {value:.2f}</title></circle>"
            )
    for place, text in enumerate(names):
        x, y = _LEFT + step * place, height - _BOTTOM + 15
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    return _legend(list(series), COLOURS[: len(series)]) + _svg(width, height, name, "".join(parts))


def reliability(title: str, points: Sequence[tuple[float, float, int]]) -> str:
    """Return a reliability diagram: acceptance against confidence. A dot's area is its fraction of the drafts.

    Args:
        title: Title of the diagram.
        points: Mean confidence, fraction accepted, and number of drafts.
    """
    size, left, top = 150, 34, 22
    total = max(sum(count for _, _, count in points), 1)
    parts = [
        f'<text x="{left + size / 2}" y="14" text-anchor="middle" font-weight="600">{escape(title)}</text>'
        f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="var(--line)"/>'
        f'<line x1="{left}" y1="{top + size}" x2="{left + size}" y2="{top}" stroke="var(--third)" '
        'stroke-dasharray="4 4"/>'
    ]
    for value in (0, 1):
        parts.append(
            f'<text class="soft" x="{left - 5}" y="{top + size * (1 - value) + 4}" text-anchor="end">{value}</text>'
            f'<text class="soft" x="{left + size * value}" y="{top + size + 15}" text-anchor="middle">{value}</text>'
        )
    for confidence, accepted, count in points:
        if count:
            radius = min(max(2.0, 24 * (count / total) ** 0.5), 14.0)
            parts.append(
                f'<circle cx="{left + size * confidence:.1f}" cy="{top + size * (1 - accepted):.1f}" r="{radius:.1f}" '
                f'fill="var(--accent)" fill-opacity=".55" stroke="var(--accent)">'
                f"<title>probability {confidence:.0%}, accepted {accepted:.0%}, {count} drafts</title></circle>"
            )
    return _svg(left + size + 14, top + size + 22, f"{title}: acceptance against probability", "".join(parts))
