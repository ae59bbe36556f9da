"""Tokens as a reader can see them: spaces, line ends and bytes that are no text too."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.tokenizers import ByteTokenizer

_LONGEST_CHARACTER = 4
_MARKS = {"\n": "\u21b5\n", "\r": "\u240d", "\t": "\u21e5\t"}
_NO_TEXT = "\ufffd"


@dataclass(frozen=True)
class Shown:
    """How to show a token.

    Attributes:
        text: In its place in the text.
        name: By itself.
        is_text: False for a token that makes no text of its own: part of a character, a control byte.
    """

    text: str
    name: str
    is_text: bool


def shown_tokens(tokens: Sequence[int], tokenizer: Tokenizer | None) -> list[Shown]:
    r"""Return how to show the tokens of a text, one after the other.

    A character of several tokens is shown at its last; those before it, and all that never become a character, are
    shown by their numbers.

    Args:
        tokens: Of the text.
        tokenizer: Of the model; without one, tokens are numbers.

    Example:
        >>> [shown.text for shown in shown_tokens(list("a\n\u20ac".encode()), ByteTokenizer())]
        ['a', '↵\n', 'E2', '82', '€']
    """
    if tokenizer is None:
        return [Shown(f"{token} ", str(token), True) for token in tokens]
    found: list[Shown] = []
    while len(found) < len(tokens):
        found += _next(tokens[len(found) : len(found) + _LONGEST_CHARACTER], tokenizer)
    return found


def _next(tokens: Sequence[int], tokenizer: Tokenizer) -> list[Shown]:
    """Show the first tokens that make text together, or else the first of them alone."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:count]))
        if text and _NO_TEXT not in text:
            numbers = [_number(token, tokenizer) for token in tokens[: count - 1]]
            return [*numbers, _text(text, tokens[count - 1], tokenizer)]
    return [_number(tokens[0], tokenizer)]


def shown_token(token: int, tokenizer: Tokenizer | None) -> str:
    """Return how to name a token by itself.

    Args:
        token: Its id.
        tokenizer: Of the model.
    """
    return shown_tokens([token], tokenizer)[0].name


def _number(token: int, tokenizer: Tokenizer) -> Shown:
    text = f"{token:02X}" if isinstance(tokenizer, ByteTokenizer) else f"#{token}"
    name = f"byte {text}" if isinstance(tokenizer, ByteTokenizer) else f"token {token}"
    return Shown(text, name, False)


def _text(text: str, token: int, tokenizer: Tokenizer) -> Shown:
    if any(character not in _MARKS and unicodedata.category(character)[0] == "C" for character in text):
        return _number(token, tokenizer)
    shown = "".join(_MARKS.get(character, character) for character in text)
    name = "".join(_MARKS.get(character, "\u2423" if character == " " else character).strip() for character in text)
    return Shown(shown, name, True)
