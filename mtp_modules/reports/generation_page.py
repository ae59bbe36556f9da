"""A generation as one HTML page: each token in the colour of the depth at which it was drafted and accepted."""

from collections.abc import Sequence
from html import escape

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.reports.generation_style import SCRIPT, SHADES, STYLE
from mtp_modules.reports.page import page
from mtp_modules.reports.recording import Alternative, RecordedToken, Recording, RejectedDraft
from mtp_modules.reports.token_text import Shown, shown_token, shown_tokens

_TITLE = "Which tokens were drafted?"


def generation_page(run: Recording, tokenizer: Tokenizer | None, *, model: str, settings: str, greedy: bool) -> str:
    """Return the page. It loads no other file; its script only adds keyboard navigation.

    Args:
        run: The recorded generation.
        tokenizer: Tokenizer of the model; without one, tokens are shown as ids.
        model: Summary of the model.
        settings: Description of the decoder's settings.
        greedy: Whether decoding was greedy, so that the distributions shown are those at temperature 1.
    """
    everything = [*run.prompt, *(token.token for token in run.tokens)]
    shown = shown_tokens(everything, tokenizer)
    prompt, output = shown[: len(run.prompt)], shown[len(run.prompt) :]
    parts = "".join(
        _token(place, token, how, tokenizer) for place, (token, how) in enumerate(zip(run.tokens, output, strict=True))
    )
    note = "Decoding was greedy: the distributions are those at temperature 1 of the logits that were compared. "
    body = (
        f'<div class="layout"><div>\n<header>\n<h1>{_TITLE}</h1>\n'
        f'<p class="soft">{escape(model)}<br>{escape(settings)}</p>\n</header>\n'
        f"{_summary(run)}"
        f'<p class="soft">{note if greedy else ""}p is a token\'s probability under the model, q under the draft '
        "distribution at its position. Hover over a token, or press Tab and use the arrow keys.</p>\n"
        '<input type="checkbox" id="rejected"><label for="rejected">Show rejected drafts, struck through</label>\n'
        f'<main class="text"><span class="prompt">{"".join(map(_plain, prompt))}</span>{parts}</main>\n</div>\n'
        '<aside class="soft" aria-hidden="true">Hover over a token to see its probabilities here.</aside>\n</div>\n'
    )
    return page(_TITLE, body, STYLE, SCRIPT)


def _plain(shown: Shown) -> str:
    """Return the HTML of a token's text."""
    text = escape(shown.text)
    if not shown.is_text:
        return f'<span class="byte">{text}</span>'
    for mark in "\u21b5\u21e5\u240d":
        text = text.replace(mark, f'<span class="mark">{mark}</span>')
    return text


def _token(place: int, token: RecordedToken, shown: Shown, tokenizer: Tokenizer | None) -> str:
    rejected = "".join(_rejected(place, draft, tokenizer) for draft in token.rejected)
    origin = f"draft, accepted at depth {token.depth}" if token.depth else "chosen by the model"
    rows = f"<p><b>p {_chance(token.p)}</b> model{_q(token.q)}</p>"
    if token.depth:
        tables = _table("Model", token.model, token.token, tokenizer)
        tables += _table("Draft", token.draft, token.token, tokenizer)
    elif token.draft:
        drafted = token.rejected[0].token if token.rejected else None
        tables = _table("Model", token.model, token.token, tokenizer) + _table("Draft", token.draft, drafted, tokenizer)
    else:
        tables = _table("Model", token.model, token.token, tokenizer)
    kind = f"d{min(token.depth, SHADES)}" if token.depth else "own"
    card = f'{rows}<span class="distributions">{tables}</span>'
    return rejected + _span(f"t{place}", f"t {kind}", _plain(shown), shown.name, origin, card)


def _rejected(place: int, draft: RejectedDraft, tokenizer: Tokenizer | None) -> str:
    name = shown_token(draft.token, tokenizer)
    rows = f"<p><b>p {_chance(draft.p)}</b> model{_q(draft.q)}</p>"
    text = escape(name) + (" " if tokenizer is None else "")
    origin = f"draft, rejected at depth {draft.depth}"
    return _span(f"r{place}-{draft.depth}", "t r", f"<s>{text}</s>", name, origin, rows)


def _span(key: str, classes: str, inside: str, name: str, origin: str, card: str) -> str:
    label = escape(f"{name}, {origin}", quote=True)
    return (
        f'<span class="{classes}" tabindex="0" role="note" aria-label="{label}" aria-describedby="{key}">{inside}'
        f'<span class="about" role="tooltip" id="{key}"><code>{escape(name)}</code> {escape(origin)}{card}</span>'
        "</span>"
    )


def _chance(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "&lt; 0.001"


def _q(value: float | None) -> str:
    return "" if value is None else f" &emsp; <b>q {_chance(value)}</b> draft"


def _table(name: str, probs: Sequence[Alternative], chosen: int | None, tokenizer: Tokenizer | None) -> str:
    rows = "".join(
        f"<tr{' class=chosen' if one.token == chosen else ''}><td><code>{escape(shown_token(one.token, tokenizer))}"
        f"</code></td><td>{_chance(one.probability)}</td>{_bar('td', one.probability)}</tr>"
        for one in probs
    )
    return f"<table><caption>{name}</caption><tbody>{rows}</tbody></table>"


def _bar(tag: str, share: float) -> str:
    return f'<{tag} class="bar"><i style="width:{100 * share:.1f}%"></i></{tag}>'


def _summary(run: Recording) -> str:
    """Return the counts and the legend."""
    stats = run.stats
    keys = ['<li><span class="swatch own"></span>chosen by the model</li>']
    for depth, (drafted, accepted) in enumerate(zip(stats.drafted, stats.accepted, strict=True), start=1):
        share = accepted / max(drafted, 1)
        keys.append(
            f'<li><span class="swatch d{min(depth, SHADES)}"></span>depth {depth}: {share:.0%} '
            f'<span class="soft">({accepted} of {drafted})</span>{_bar("span", share)}</li>'
        )
    return (
        '<section class="card" aria-label="Summary">\n<p class="figures">'
        f"<span><b>{stats.tokens_per_forward:.2f}</b> tokens per forward pass</span>"
        f"<span><b>{stats.tokens}</b> tokens</span><span><b>{stats.forwards}</b> forward passes</span>"
        f"<span><b>{sum(token.depth > 0 for token in run.tokens)}</b> accepted drafts</span></p>\n"
        f'<ul class="legend" aria-label="Colours, and acceptance rate by depth">{"".join(keys)}</ul>\n</section>\n'
    )
