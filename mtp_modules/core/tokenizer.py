"""The contract of tokenizers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component


class Tokenizer(Component, ABC):
    """Turns text into token ids and back."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number ``V`` of token ids. The model's embedding may have more rows."""

    @property
    @abstractmethod
    def end_token(self) -> int | None:
        """The id that ends a document, or ``None``."""

    @property
    def begin_tokens(self) -> tuple[int, ...]:
        """The ids that ``encode`` puts before every text, with which a document begins."""
        return ()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that a model continues: ``begin_tokens`` first, and no end token."""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Return the token ids of texts alone: without ``begin_tokens``. Fast tokenizers encode them in parallel.

        Args:
            texts: Documents, or parts of them.
        """
        begin = len(self.begin_tokens)
        return [np.array(self.encode(text)[begin:], dtype=np.int64) for text in texts]

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids.

        Invalid bytes become the replacement character. An id of ``vocab_size`` or above decodes to nothing: a model
        whose embedding has more rows than the tokenizer has tokens can emit it. The text of a prefix of the tokens is a
        prefix of the text, except for a character of which bytes are still missing.

        Raises:
            ValueError: If an id is negative.
        """

    def foreign_files(self) -> dict[str, str]:
        """Return the content of the files by which ``transformers`` and engines know this tokenizer, by name.

        There are none by default: the tokenizer is known to this package only.
        """
        return {}


def known_tokens(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Return the ids for which a tokenizer has tokens.

    Args:
        tokenizer: The tokenizer.
        tokens: The ids.

    Raises:
        ValueError: If an id is negative.
    """
    size = tokenizer.vocab_size
    if not tokens or (min(tokens) >= 0 and max(tokens) < size):
        return tokens
    if min(tokens) < 0:
        refuse(tokenizer, f"token {min(tokens)} is negative; give ids of the vocabulary 0..{size - 1}.")
    return [token for token in tokens if token < size]
