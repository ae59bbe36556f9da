"""Tokenizers: text to token ids and back."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.tokenizer import known_tokens

_WORD = re.compile(r"\w+|[^\w\s]")
_NO_SPACE_BEFORE = re.compile(r" ([.,!?])")


class ByteTokenizer(Tokenizer):
    """Read text as its UTF-8 bytes: no training, no files, nothing is out of vocabulary.

    Byte 0, which text does not contain, ends a document.

    Example:
        >>> tokens = ByteTokenizer().encode("né")
        >>> tokens, ByteTokenizer().decode(tokens)
        ([110, 195, 169], 'né')
    """

    @property
    def vocab_size(self) -> int:
        """256, the values of a byte."""
        return 256

    @property
    def end_token(self) -> int:
        """0, the NUL byte."""
        return 0

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Return the bytes of texts."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of bytes; invalid UTF-8 becomes the replacement character, an id above 255 nothing.

        Raises:
            ValueError: If an id is negative.
        """
        try:
            found = bytes(tokens)
        except ValueError:  # not all are bytes
            found = bytes(known_tokens(self, tokens))
        return found.decode("utf-8", "replace")

    def foreign_files(self) -> dict[str, str]:
        """Return a byte-level vocabulary without merges, in which the id of a token is its byte.

        No token is special: what ends a document, byte 0, is named where models are configured.
        """
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "vocab": {symbol: byte for byte, symbol in enumerate(_byte_symbols())}, "merges": []}
        content: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return {
            "tokenizer.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }


def _byte_symbols() -> list[str]:
    """Return the character by which byte-level tokenizers spell each byte: itself if printed, else one from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


class WordTokenizer(Tokenizer):
    """Split text into words of a fixed list. For text of a small, closed language.

    A word is a run of letters, digits and underscores, or a single other character. Between words there may be any
    white space; :meth:`decode` writes one space, none before ``.``, ``,``, ``!`` and ``?``.

    Args:
        words: All words, in the order of their ids.

    Raises:
        ValueError: If there is no word, one is duplicate, or one is not a single word.

    Example:
        >>> tokenizer = WordTokenizer(words=["the", "dog", "barked", "."])
        >>> tokenizer.encode("the dog barked."), tokenizer.decode([0, 1, 2, 3])
        ([0, 1, 2, 3], 'the dog barked.')
    """

    def __init__(self, *, words: Sequence[str]) -> None:
        self.words = tuple(words)
        if not self.words:
            refuse(self, "words must hold at least one word, got none.")
        for word in self.words:
            if not _WORD.fullmatch(word):
                refuse(self, f"words must hold single words, got {word!r}; split it.")
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) < len(self.words):
            twice = next(word for index, word in enumerate(self.words) if self._ids[word] != index)
            refuse(self, f"words must be different, got {twice!r} twice; leave one out.")

    @property
    def vocab_size(self) -> int:
        """Number of known words."""
        return len(self.words)

    @property
    def end_token(self) -> None:
        """``None``: nothing ends a document."""
        return None

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words of a text.

        Raises:
            ValueError: If a word is unknown.
        """
        found = _WORD.findall(text)
        for word in found:
            if word not in self._ids:
                refuse(self, f"the word {word!r} is unknown; use words of the {self.vocab_size} that it was made with.")
        return [self._ids[word] for word in found]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ids; unknown ids decode to nothing.

        Raises:
            ValueError: If an id is negative.
        """
        return _NO_SPACE_BEFORE.sub(r"\1", " ".join(self.words[token] for token in known_tokens(self, tokens)))
