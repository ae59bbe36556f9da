"""Where drafts fail: drafts by the token that was wanted, rounds by the place in the text."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.reports.draft_walk import DraftedText
from mtp_modules.reports.token_text import shown_token, text_behind

_KINDS = ("letters", "digits", "whitespace", "punctuation", "other")
_COLUMNS = (0, 1, 4, 8, 16, 32, 64)
_MOST_PLACES = 8
_MOST_TOKENS = 8


@dataclass(frozen=True)
class Group:
    """Drafts, or rounds, that have something in common.

    Attributes:
        name: What.
        count: Number of drafts that were reached, or of rounds.
        accepted: How many drafts were accepted.
    """

    name: str
    count: int
    accepted: int

    @property
    def rate(self) -> float:
        """Accepted drafts a draft, or a round."""
        return self.accepted / max(self.count, 1)


def _reached(walked: DraftedText) -> tuple[list[int], list[bool]]:
    """Return, for every draft that was reached, the token that the model chose in its place, and whether it held."""
    depth = torch.arange(walked.drafts.shape[1])
    reached = depth <= walked.accepted[:, None]
    return walked.own[reached].tolist(), (depth < walked.accepted[:, None])[reached].tolist()


def _grouped(names: Iterable[str], accepted: Iterable[int]) -> dict[str, Group]:
    counts: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for name, number in zip(names, accepted, strict=True):
        counts[name] += 1
        held[name] += number
    return {name: Group(name, count, held[name]) for name, count in counts.items()}


def kind_of(text: str) -> str:
    r"""Return which kind of token a text is: its first character that is no space decides.

    Args:
        text: Of one token.

    Example:
        >>> [kind_of(text) for text in (" for", "42", "\n    ", "_", "\ufffd")]
        ['letters', 'digits', 'whitespace', 'punctuation', 'other']
    """
    if not text or text.isspace():
        return "whitespace" if text else "other"
    first = text.lstrip()[0]
    if first.isalpha():
        return "letters"
    if first.isdigit():
        return "digits"
    return "punctuation" if first.isascii() and first.isprintable() else "other"


def by_kind(walked: DraftedText, tokenizer: Tokenizer | None) -> list[Group]:
    """Sort drafts by the kind of token that the model itself chose in their place.

    Args:
        walked: Rounds on a text.
        tokenizer: Without one there are no kinds.
    """
    if tokenizer is None:
        return []
    tokens, accepted = _reached(walked)
    kinds = {token: kind_of(text_behind(token, tokenizer)) for token in set(tokens)}
    found = _grouped((kinds[token] for token in tokens), accepted)
    return [found[name] for name in _KINDS if name in found]


def by_token(walked: DraftedText, tokenizer: Tokenizer | None) -> list[Group]:
    """Return the tokens in whose place most drafts were rejected, and all drafts there.

    Args:
        walked: Rounds on a text.
        tokenizer: Names the tokens; without one, their ids do.
    """
    tokens, accepted = _reached(walked)
    found = _grouped(map(str, tokens), accepted)
    worst = sorted(found.values(), key=lambda group: group.accepted - group.count)[:_MOST_TOKENS]
    return [Group(shown_token(int(group.name), tokenizer), group.count, group.accepted) for group in worst]


def by_place(walked: DraftedText) -> list[Group]:
    """Sort rounds by where in the row their drafts begin, in a few equal stretches; the first token is place 0.

    Args:
        walked: Rounds on a text.
    """
    last = int(walked.places.max())
    width = -(-last // _MOST_PLACES)
    names = {start: f"{start + 1} to {min(start + width, last)}" for start in range(0, last, width)}
    starts = ((walked.places - 1) // width * width).tolist()
    found = _grouped((names[start] for start in starts), walked.accepted.tolist())
    return [found[name] for name in names.values() if name in found]


def by_column(walked: DraftedText, text: Int[Tensor, "B L"], tokenizer: Tokenizer | None) -> list[Group]:
    """Sort rounds by how many tokens lie between the last line end and the token that the drafts follow.

    Args:
        walked: Rounds on a text.
        text: Whose rows and places they name.
        tokenizer: Without one there are no lines.
    """
    line_end = [] if tokenizer is None else tokenizer.encode("\n")
    if not line_end:
        return []
    places = torch.arange(text.shape[1]).expand_as(text)
    starts = torch.where(text == line_end[-1], places, -1).cummax(dim=1).values
    start = starts[walked.rows, walked.places]
    known = start >= 0
    column = (walked.places - start)[known]
    edges = torch.tensor(_COLUMNS)
    index = (torch.bucketize(column, edges, right=True) - 1).tolist()
    ends = [*(edge - 1 for edge in _COLUMNS[1:]), None]
    names = [
        str(first) if first == last else f"{first} to {last}" if last is not None else f"{first} or more"
        for first, last in zip(_COLUMNS, ends, strict=True)
    ]
    found = _grouped((names[place] for place in index), walked.accepted[known].tolist())
    return [found[name] for name in names if name in found]
