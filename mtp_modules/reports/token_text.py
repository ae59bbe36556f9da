"""Tokens as a reader can see them: spaces, line ends and bytes that are no text too."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.decoders.sampling.detokenizing import REPLACEMENT, StreamingDetokenizer

_MARKS = {"\n": "\u21b5\n", "\r": "\u240d", "\t": "\u21e5\t"}


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
    text = StreamingDetokenizer(tokenizer)
    return [_shown(text.push(token), token, tokenizer) for token in tokens]


def shown_token(token: int, tokenizer: Tokenizer | None) -> str:
    """Return how to name a token by itself, with the space that stands before it behind other text.

    Args:
        token: Its id.
        tokenizer: Of the model.
    """
    return str(token) if tokenizer is None else _shown(text_behind(token, tokenizer), token, tokenizer).name


def text_behind(token: int, tokenizer: Tokenizer) -> str:
    """Return what a token writes behind other text, with replacement characters for parts of characters.

    Args:
        token: Its id.
        tokenizer: Of the model.
    """
    text = StreamingDetokenizer(tokenizer)
    alone = text.push(token)
    return alone + text.pending if text.pending else text.push(token)  # two halves must not make a whole character


def _shown(text: str, token: int, tokenizer: Tokenizer) -> Shown:
    """Show a token that brings text; earlier tokens that have become no text are shown where they stand."""
    own = text.replace(REPLACEMENT, "")
    return _text(own, token, tokenizer) if own else _number(token, tokenizer)


def _number(token: int, tokenizer: Tokenizer) -> Shown:
    if isinstance(tokenizer, ByteTokenizer) and token < tokenizer.vocab_size:
        return Shown(f"{token:02X}", f"byte {token:02X}", False)
    return Shown(f"#{token}", f"token {token}", False)


def _text(text: str, token: int, tokenizer: Tokenizer) -> Shown:
    if any(character not in _MARKS and unicodedata.category(character)[0] == "C" for character in text):
        return _number(token, tokenizer)
    shown = "".join(_MARKS.get(character, character) for character in text)
    name = "".join(_MARKS.get(character, "\u2423" if character == " " else character).strip() for character in text)
    return Shown(shown, name, True)
