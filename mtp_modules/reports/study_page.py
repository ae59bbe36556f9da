"""The report of a study: figures and tables as files, and one page that holds everything."""

import base64
import html
from dataclasses import asdict
from pathlib import Path

import yaml

from mtp_modules.reports.look import save
from mtp_modules.reports.requests import drawn_figures, made_tables, said_verdicts
from mtp_modules.reports.tables import Table, results
from mtp_modules.studies import Outcome

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
blockquote { margin: 1rem 0; padding: 0 1rem; border-left: 4px solid #8888; }
.verdict { background: #0072b21a; border-left: 4px solid #0072b2; padding: .2rem 1rem; }
.missing { background: #d55e001a; border-left: 4px solid #d55e00; padding: .2rem 1rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: white; border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; background: #8881; padding: .8rem; font-size: .8rem; }
@media print { details { display: block; } body { max-width: none; } }
"""
_RUN_COLUMNS = ("parameters", "steps", "tokens", "flops", "seconds", "tokens_per_second")


def write_report(outcome: Outcome, folder: Path, command: str) -> Path:
    """Write ``figures/*.png`` and ``*.svg``, ``tables/*.csv`` and ``*.md``, ``verdict.md`` and ``report.html``.

    Args:
        outcome: Of the study.
        folder: Where to.
        command: That makes it again.

    Returns:
        Path of the page, which needs no other file and no network.
    """
    parts = []
    for name, figure in drawn_figures(outcome):
        _, svg = save(figure, folder / "figures" / name)
        title = figure.get_suptitle()
        parts.append(f"<figure>{_image(svg, title)}</figure>")
    tables = [*made_tables(outcome), ("runs", _runs(outcome))]
    for name, table in tables:
        for suffix, text in ((".csv", table.csv()), (".md", table.markdown())):
            path = folder / "tables" / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        parts.append(f"<h2>{html.escape(table.title)}</h2>\n<div class=wide>{table.html()}</div>")
    verdicts = said_verdicts(outcome)
    (folder / "verdict.md").write_text("".join(f"- {sentence}\n" for sentence in verdicts), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(outcome, verdicts, parts, command), encoding="utf-8")
    return page


def _page(outcome: Outcome, verdicts: list[str], parts: list[str], command: str) -> str:
    study = outcome.study
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in verdicts)
    missing = ""
    if outcome.missing:
        missing = f"<div class=missing><p>No result of: {html.escape('; '.join(outcome.missing))}.</p></div>"
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(study.name)}: {html.escape(study.question)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(study.question)}</h1>
<p>The claim:</p><blockquote><p>{html.escape(study.claim)}</p></blockquote>
<h2>Verdict</h2>
<div class=verdict>{said}</div>
{missing}
<p>{html.escape(_protocol(outcome))}</p>
{body}
<h2>How it was made</h2>
<p>To make it again:</p><pre>{html.escape(command)}</pre>
{_machines(outcome)}
<details><summary>The study</summary><pre>{html.escape(_yaml(asdict(study)))}</pre></details>
{_settings(outcome)}
</body></html>
"""


def _protocol(outcome: Outcome) -> str:
    study, about = outcome.study, outcome.about
    equal = {"data": "see equally much data", "flops": "take equally many FLOPs", "seconds": "compute equally long"}
    limit = "" if about["minutes"] is None else f" The budget of {about['minutes']:g} minutes"
    if limit:
        limit += " needed no shortening." if about["scale"] == 1 else f" scaled all lengths to {about['scale']:.3g}."
    return (
        f"All arms {equal[study.match]}, unless an arm says otherwise. Bands and ± are 95% intervals of the mean over "
        f"{about['seeds']} seeds (Student's t). Figures are of held-out data.{limit}"
    )


def _runs(outcome: Outcome) -> Table:
    every = outcome.study.sweep is not None
    return results(outcome, columns=_RUN_COLUMNS, title="What every arm took", every_value=every)


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'


def _machines(outcome: Outcome) -> str:
    """List what results were made with; all of it where it differs between runs."""
    lines = []
    for name in ("machine", "versions"):
        told = [", ".join(f"{key} {value}" for key, value in result[name].items()) for result in outcome.results]
        lines += [f"<p>{name.capitalize()}: {html.escape(text)}.</p>" for text in dict.fromkeys(told)]
    return "\n".join(lines)


def _settings(outcome: Outcome) -> str:
    found = []
    for arm in outcome.arms:
        result = outcome.of(arm, outcome.last_value)[:1]
        for first in result:
            text = html.escape(_yaml(first["settings"]))
            title = f"Settings of {html.escape(arm)}, first seed"
            found.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return "\n".join(found)


def _yaml(content: object) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
