"""The report of a study: figures and tables as files, and one page with everything."""

import base64
import html
from dataclasses import asdict
from pathlib import Path

import yaml

from mtp_modules.core.saving import write_text
from mtp_modules.reports.look import save, sentence_start
from mtp_modules.reports.page import page
from mtp_modules.reports.requests import create_figures, create_tables, create_verdicts
from mtp_modules.reports.tables import Table, results
from mtp_modules.studies import Outcome

_STYLE = """
blockquote { margin: .25rem 0 1rem; padding: 0 1rem; border-left: 4px solid var(--line); }
.card { margin: 1rem 0; }
.card h2 { margin-top: 0; }
.card p:last-child { margin-bottom: 0; }
.missing { border-left: 4px solid var(--second); }
img { max-width: 100%; background: white; border-radius: .6rem; }
th { white-space: normal; vertical-align: bottom; }
pre { overflow-x: auto; background: var(--card); padding: .8rem;
  font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { pre { white-space: pre-wrap; } }
"""
_RUN_COLUMNS = ("parameters", "steps", "tokens", "flops", "computing", "tokens_per_second")


def write_report(outcome: Outcome, folder: Path, command: str) -> Path:
    """Write ``figures/*.png`` and ``*.svg``, ``tables/*.csv`` and ``*.md``, ``verdict.md`` and ``report.html``.

    Args:
        outcome: Outcome of the study.
        folder: Folder to write to.
        command: Command that reproduces the study.

    Returns:
        Path of the self-contained page.
    """
    parts = []
    for name, figure in create_figures(outcome):
        _, svg = save(figure, folder / "figures" / name)
        title = figure.get_suptitle()
        parts.append(f"<figure>{_image(svg, title)}</figure>")
    tables = [*create_tables(outcome), ("runs", _runs(outcome))]
    for name, table in tables:
        for suffix, text in ((".csv", table.csv()), (".md", table.markdown())):
            path = folder / "tables" / f"{name}{suffix}"
            write_text(path, text)
        parts.append(f"<h2>{html.escape(sentence_start(table.title))}</h2>\n{table.html()}")
    verdicts = create_verdicts(outcome)
    write_text(folder / "verdict.md", "".join(f"- {sentence}\n" for sentence in verdicts))
    path = folder / "report.html"
    write_text(path, _report(outcome, verdicts, parts, command))
    return path


def _report(outcome: Outcome, verdicts: list[str], parts: list[str], command: str) -> str:
    study = outcome.study
    sentences = "".join(f"<p>{html.escape(sentence)}</p>\n" for sentence in verdicts)
    missing = ""
    if outcome.missing:
        missing = f'<div class="card missing"><p>No results: {html.escape("; ".join(outcome.missing))}.</p></div>\n'
    body = "\n".join(
        [
            f"<h1>{html.escape(study.question)}</h1>",
            f"<p>The claim:</p>\n<blockquote><p>{html.escape(study.claim)}</p></blockquote>",
            f'<section class="card" aria-label="Verdict">\n<h2>Verdict</h2>\n{sentences}</section>\n{missing}',
            f'<p class="soft">{html.escape(_protocol(outcome))}</p>',
            *parts,
            "<h2>Reproduction</h2>",
            f"<p>Command:</p>\n<pre>{html.escape(command)}</pre>",
            _machines(outcome),
            _folded("The study", asdict(study)),
            *_settings(outcome),
        ]
    )
    return page(f"{study.name}: {study.question}", body, _STYLE)


def _protocol(outcome: Outcome) -> str:
    study, about = outcome.study, outcome.about
    equal = {"data": "equal amounts of data", "flops": "equal training FLOPs", "seconds": "equal compute time"}
    limit = "" if about["minutes"] is None else f" The budget of {about['minutes']:g} minutes"
    if limit:
        limit += " required no scaling." if about["scale"] == 1 else f" scaled all lengths to {about['scale']:.3g}."
    return (
        f"All arms use {equal[study.match]}, unless an arm sets its own match. Bands and ± are 95% confidence "
        f"intervals of the mean over {about['seeds']} seeds (Student's t). Metrics are measured on held-out data; "
        f"a mean accepted length includes the token that is always emitted.{limit}"
    )


def _runs(outcome: Outcome) -> Table:
    every = outcome.study.sweep is not None
    return results(outcome, columns=_RUN_COLUMNS, title="Cost of every arm", every_value=every)


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'


def _machines(outcome: Outcome) -> str:
    """List the machines and software versions of all runs, without duplicates."""
    lines = []
    for name in ("machine", "versions"):
        texts = [", ".join(f"{key} {value}" for key, value in result[name].items()) for result in outcome.results]
        lines += [f"<p>{name.capitalize()}: {html.escape(text)}.</p>" for text in dict.fromkeys(texts)]
    return "\n".join(lines)


def _settings(outcome: Outcome) -> list[str]:
    first = [(arm, result) for arm in outcome.arms for result in outcome.of(arm, outcome.last_value)[:1]]
    return [_folded(f"Settings of {arm}, first seed", result["settings"]) for arm, result in first]


def _folded(title: str, content: object) -> str:
    """Return plain values as collapsible YAML."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
