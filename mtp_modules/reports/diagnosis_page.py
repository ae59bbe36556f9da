"""A diagnosis as one self-contained HTML page: verdict, charts and tables."""

from html import escape

from mtp_modules.reports.charts import bars, lines, reliability
from mtp_modules.reports.diagnosis import Diagnosis
from mtp_modules.reports.diagnosis_tables import TextTable, tables
from mtp_modules.reports.diagnosis_verdict import verdict
from mtp_modules.reports.page import html_table, page

_STYLE = """
.card li { margin: .35rem 0; }
.card ul { margin: .25rem 0; padding-left: 1.2rem; }
.card li:first-child { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; }
.key span { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: center; }
.pair figure { flex: 0 1 31rem; }
.pair th, .pair td { padding-left: .55rem; padding-right: .55rem; }
.pair tr > :first-child { padding-left: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 3rem; }
.squares { display: flex; flex-wrap: wrap; gap: .75rem; }
"""


def diagnosis_page(found: Diagnosis, origin: str = "") -> str:
    """Return the page. It has no script and loads no other file.

    Args:
        found: The diagnosis.
        origin: The text, the prompts and the machine, as a line of plain text.
    """
    sentences = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in verdict(found))
    numbers, drafts, heads, *others = tables(found)
    parts = [
        "<header>\n<h1>Why are drafts accepted or rejected?</h1>\n"
        f'<p class="soft">{escape(found.model)}<br>{escape(origin)}</p>\n</header>\n'
        f'<section class="card" aria-label="Verdict">\n<ul>\n{sentences}</ul>\n</section>\n',
        _section(numbers, _speed_chart(found)),
        _section(drafts, _depth_chart(found)),
        _calibration(found),
        _section(heads, _head_chart(found)),
    ]
    parts.append(f'<div class="grid">\n{"".join(_section(table, "") for table in others)}</div>')
    return page("Why are drafts accepted or rejected?", "\n".join(parts), _STYLE)


def _section(table: TextTable, chart: str) -> str:
    figure = f"<figure>{chart}</figure>\n" if chart else ""
    return (
        f'<section>\n<h2>{escape(table.title)}</h2>\n<p class="soft">{escape(table.note)}</p>\n'
        f'<div class="pair">{figure}{html_table(table.columns, table.rows)}</div>\n</section>'
    )


def _speed_chart(found: Diagnosis) -> str:
    return lines(
        "Speed-up over plain decoding by number of drafts",
        "drafts per round",
        [str(number.num_drafts) for number in found.numbers],
        {
            "forecast for held-out text": [number.forecast for number in found.numbers],
            "measured on generated text": [number.measured for number in found.numbers],
        },
        marked=found.numbers.index(found.forecast_best),
    )


def _depth_chart(found: Diagnosis) -> str:
    return bars(
        "Acceptance rate by depth",
        "depth of the draft",
        [str(depth.depth) for depth in found.depths],
        {
            "accepted, of the drafts reached": [depth.conditional for depth in found.depths],
            "accepted at temperature 1 (1 - TV)": [depth.overlap for depth in found.depths],
            "all drafts to this depth accepted": [depth.accepted / max(found.rounds, 1) for depth in found.depths],
        },
        percent=True,
    )


def _head_chart(found: Diagnosis) -> str:
    return bars(
        "Accuracy of every head",
        "head",
        [str(score.horizon) for score in found.accuracies],
        {
            "top-1": [score.top1 for score in found.accuracies],
            "top-5": [score.top5 for score in found.accuracies],
            "most frequent token": [score.most_frequent for score in found.accuracies],
        },
        percent=True,
    )


def _calibration(found: Diagnosis) -> str:
    diagrams = "\n".join(
        reliability(f"draft {depth.depth}", [(one.confidence, one.accepted, one.count) for one in depth.bins])
        for depth in found.depths
    )
    predicted = "\n".join(
        reliability(f"draft {depth.depth}", [(one.confidence, one.accepted, one.count) for one in depth.predicted_bins])
        for depth in found.depths
        if depth.predicted_bins
    )
    if predicted:
        predicted = (
            '<p class="soft">The same of the acceptance that the heads predict before they sample a draft.</p>\n'
            f'<figure class="squares">\n{predicted}\n</figure>\n'
        )
    return (
        "<section>\n<h2>Calibration</h2>\n"
        '<p class="soft">Reliability diagrams: the probability of a draft under the draft distribution (x) and the '
        "fraction of such drafts that greedy decoding accepts (y). On the dashed line they are equal; above it drafts "
        "are accepted more often than their probability. The area of a dot is its number of drafts. At temperature 1 "
        "acceptance does not depend on a draft's probability but on the distance between the distributions of draft "
        "and model: 1 - TV, in the table above.</p>\n"
        f'<figure class="squares">\n{diagrams}\n</figure>\n{predicted}</section>'
    )
