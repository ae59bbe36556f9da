"""The contract of sources of documents."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mtp_modules.core.component import Component
from mtp_modules.core.tokenizer import Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: one mapping with ``role`` and ``content`` per turn."""


@dataclass(frozen=True)
class Document:
    """One document: a text, token ids, or the messages of a conversation.

    Attributes:
        name: The same on every machine, such as a path relative to its source.
        text: The text, or its parts in order, which are read lazily. The tokenizer's end token follows it.
        tokens: Token ids ``(N,)`` instead of a text, taken as they are: no end token follows.
        loss_mask: With ``tokens`` ``(N,)``: False at tokens that are not trained on; ``None`` if all are.
        messages: A conversation instead of a text, which :class:`~mtp_modules.data.Chat` turns into tokens.
        key: What decides its split where shares are asked for; the name if ``None``.
    """

    name: str
    text: str | Iterable[str] | None = None
    tokens: npt.NDArray[np.integer[Any]] | None = None
    loss_mask: npt.NDArray[np.bool_] | None = None
    messages: Messages | None = None
    key: str | None = None


class DocumentSource(Component, ABC):
    """Gives documents, in an order that is the same on every machine and in every pass.

    Splits, tokens, shards, packing and the order of training are made behind it, once for all sources.

    Attributes:
        skipped: Of the last pass: reasons, and the names of what was left out for each.
    """

    skipped: dict[str, list[str]]

    @abstractmethod
    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield the documents, read lazily.

        Args:
            tokenizer: Of the model, for sources that hold or make token ids.

        Raises:
            ValueError: If the source does not exist, holds nothing, or does not fit the tokenizer.
        """

    @abstractmethod
    def fingerprint(self, hash_file: "FileHash") -> str:
        """Return a text that is another one whenever the documents are.

        Args:
            hash_file: Hashes the content of a file.
        """

    def num_documents(self) -> int | None:
        """Return the number of documents if it is known before they are read; ``None`` otherwise."""
        return None

    def size(self) -> int | None:
        """Return the bytes that a pass reads if they are known, for a progress bar; ``None`` otherwise."""
        return None


class FileHash(ABC):
    """Hashes files; a cache may remember what it has hashed."""

    @abstractmethod
    def __call__(self, path: Any) -> str:
        """Return the hash of a file's content.

        Args:
            path: Of the file.
        """


def skipped_sentence(source: DocumentSource) -> str | None:
    """Return what a source left out in its last pass, with reasons, counts and an example each; ``None`` if nothing.

    Args:
        source: After a pass.
    """
    found = getattr(source, "skipped", {})
    told = [f"{len(names)} {reason} (such as {names[0]!r})" for reason, names in sorted(found.items()) if names]
    return f"{type(source).__name__}: left out {', '.join(told)}." if told else None
