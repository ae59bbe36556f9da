"""Where drafts are rejected: drafts by the model's argmax token, rounds by their position in the text."""

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
_NUM_STRETCHES = 8
_NUM_TOKENS = 8


@dataclass(frozen=True)
class Group:
    """Drafts, or rounds, with a common property.

    Attributes:
        name: Name of the group.
        count: Number of drafts that were reached, or of rounds.
        accepted: Number of accepted drafts.
    """

    name: str
    count: int
    accepted: int

    @property
    def rate(self) -> float:
        """Accepted drafts per draft, or per round."""
        return self.accepted / max(self.count, 1)


def _reached(walked: DraftedText) -> tuple[list[int], list[bool]]:
    """Return for every draft that was reached the model's argmax token at its position, and if it was accepted."""
    depth = torch.arange(walked.drafts.shape[1])
    reached = depth <= walked.accepted[:, None]
    return walked.target_tokens[reached].tolist(), (depth < walked.accepted[:, None])[reached].tolist()


def _grouped(names: Iterable[str], accepted: Iterable[int]) -> dict[str, Group]:
    counts: Counter[str] = Counter()
    accepted_counts: Counter[str] = Counter()
    for name, number in zip(names, accepted, strict=True):
        counts[name] += 1
        accepted_counts[name] += number
    return {name: Group(name, count, accepted_counts[name]) for name, count in counts.items()}


def kind_of(text: str) -> str:
    r"""Return the kind of a token, decided by its first character that is not whitespace.

    Args:
        text: Text of one token.

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
    """Group drafts by the kind of the model's argmax token at their position.

    Args:
        walked: Rounds of drafting along a text.
        tokenizer: Tokenizer of the model; without one the result is empty.
    """
    if tokenizer is None:
        return []
    tokens, accepted = _reached(walked)
    kinds = {token: kind_of(text_behind(token, tokenizer)) for token in set(tokens)}
    found = _grouped((kinds[token] for token in tokens), accepted)
    return [found[name] for name in _KINDS if name in found]


def by_token(walked: DraftedText, tokenizer: Tokenizer | None) -> list[Group]:
    """Group drafts by the model's argmax token at their position; return the groups with most rejections.

    Args:
        walked: Rounds of drafting along a text.
        tokenizer: Tokenizer of the model; without one, groups are named by token ids.
    """
    tokens, accepted = _reached(walked)
    found = _grouped(map(str, tokens), accepted)
    worst = sorted(found.values(), key=lambda group: group.accepted - group.count)[:_NUM_TOKENS]
    return [Group(shown_token(int(group.name), tokenizer), group.count, group.accepted) for group in worst]


def by_position(walked: DraftedText) -> list[Group]:
    """Group rounds by the position in the row of the token that the drafts follow, in equal stretches from 0.

    Args:
        walked: Rounds of drafting along a text.
    """
    last = int(walked.positions.max())
    width = -(-last // _NUM_STRETCHES)
    names = {start: f"{start + 1} to {min(start + width, last)}" for start in range(0, last, width)}
    starts = ((walked.positions - 1) // width * width).tolist()
    found = _grouped((names[start] for start in starts), walked.accepted.tolist())
    return [found[name] for name in names.values() if name in found]


def by_column(walked: DraftedText, text: Int[Tensor, "B L"], tokenizer: Tokenizer | None) -> list[Group]:
    """Group rounds by the number of tokens between the last newline and the token that the drafts follow.

    Args:
        walked: Rounds of drafting along a text.
        text: The text, indexed by the rows and positions of the rounds.
        tokenizer: Tokenizer of the model; without one the result is empty.
    """
    newline = [] if tokenizer is None else tokenizer.encode("\n")
    if not newline:
        return []
    positions = torch.arange(text.shape[1]).expand_as(text)
    starts = torch.where(text == newline[-1], positions, -1).cummax(dim=1).values
    start = starts[walked.rows, walked.positions]
    known = start >= 0
    column = (walked.positions - start)[known]
    edges = torch.tensor(_COLUMNS)
    index = (torch.bucketize(column, edges, right=True) - 1).tolist()
    ends = [*(edge - 1 for edge in _COLUMNS[1:]), None]
    names = [
        str(first) if first == last else f"{first} to {last}" if last is not None else f"{first} or more"
        for first, last in zip(_COLUMNS, ends, strict=True)
    ]
    found = _grouped((names[place] for place in index), walked.accepted[known].tolist())
    return [found[name] for name in names if name in found]
