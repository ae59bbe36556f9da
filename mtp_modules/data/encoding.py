"""From documents to token ids, in batches that a tokenizer encodes in parallel."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document
from mtp_modules.data.sources.files import cut_text

Ids: TypeAlias = npt.NDArray[np.integer[Any]]

_BATCH = 2**21
"""Characters that are encoded together."""
_CONTEXT = 200
"""Characters of the line before a part that are encoded with it, so that it is not taken for a beginning."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document.

    Attributes:
        split: The document's.
        name: The document's.
        first: Whether the document begins here.
        last: Whether it ends here.
        tokens: Ids ``(N,)``, those that begin and end a document included.
        loss_mask: As in :class:`~mtp_modules.data.Document`.
        num_bytes: About the bytes that were read for it.
    """

    split: str
    name: str
    first: bool
    last: bool
    tokens: Ids
    loss_mask: npt.NDArray[np.bool_] | None
    num_bytes: int


@dataclass(frozen=True)
class _Part:
    """A part of a document before it is encoded, with the end of the line before it."""

    split: str
    document: Document
    text: str
    context: str
    first: bool
    last: bool


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the type of stored token ids: 16 bits if they fit.

    Args:
        vocab_size: Number ``V`` of token ids.
    """
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_documents(
    documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer, *, skip: int = 0
) -> Iterator[Piece]:
    """Yield the tokens of documents, in order.

    A text is cut into parts at line ends; each is encoded with the end of the line before it, so that the parts give
    the tokens of the whole wherever no token spans a line end.

    Args:
        documents: Each with its split.
        tokenizer: Turns text into token ids.
        skip: How many pieces to leave out from the beginning, which are read but not encoded.

    Raises:
        ValueError: If a document is neither a text nor tokens, or has ids outside the vocabulary.
    """
    batches = _batches(islice(_parts(documents), skip, None))
    with ThreadPoolExecutor(1) as thread:  # the tokenizer's own threads encode while the last batch is stored
        ahead = None
        for batch in batches:
            following = (batch, thread.submit(_encode, batch, tokenizer))
            if ahead is not None:
                yield from _pieces(ahead[0], ahead[1].result(), tokenizer)
            ahead = following
        if ahead is not None:
            yield from _pieces(ahead[0], ahead[1].result(), tokenizer)


def _parts(documents: Iterable[tuple[str, Document]]) -> Iterator[_Part]:
    for split, document in documents:
        if document.tokens is not None:
            yield _Part(split, document, "", "", True, True)
            continue
        if document.text is None:
            refuse(
                "documents",
                f"{document.name!r} holds messages, which a tokenizer's chat template turns into tokens; "
                "put its source into a Chat source.",
            )
        given = [document.text] if isinstance(document.text, str) else document.text
        texts = (part for text in given for part in cut_text(text) if part)
        context, first = "", True
        for text, following in pairwise(_with_end(texts)):
            assert text is not None
            yield _Part(split, document, text, context, first, following is None)
            context, first = text[text.rfind("\n", 0, len(text) - 1) + 1 :][-_CONTEXT:], False


def _with_end(texts: Iterable[str]) -> Iterator[str | None]:
    yield from texts
    yield None


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text) if part.document.tokens is None else len(part.document.tokens)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[_Part], tokenizer: Tokenizer) -> list[Ids]:
    texts = []
    for part in batch:
        if part.document.tokens is None:
            texts += [part.context, part.context + part.text] if part.context else [part.text]
    return tokenizer.encode_batch(texts)


def _pieces(batch: list[_Part], encoded: list[Ids], tokenizer: Tokenizer) -> Iterator[Piece]:
    dtype, size = token_type(tokenizer.vocab_size), tokenizer.vocab_size
    begin = list(tokenizer.begin_tokens)
    end = [] if tokenizer.end_token is None else [tokenizer.end_token]
    ready = iter(encoded)
    for part in batch:
        document, mask = part.document, part.document.loss_mask
        if document.tokens is not None:
            ids = np.asarray(document.tokens)
            length = ids.nbytes
        else:
            before = next(ready) if part.context else ()
            ids = next(ready)
            if part.context and np.array_equal(ids[: len(before)], before):
                ids = ids[len(before) :]
            elif part.context:  # a token spans the cut
                ids = np.asarray(encode_continuation(part.text, tokenizer))
            if not (part.first and part.last and not len(ids)):
                ids = np.concatenate([begin * part.first, ids, end * part.last]).astype(np.int64)
            length = len(part.text)
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            refuse(
                "TextDataModule",
                f"{type(tokenizer).__name__} gave {document.name!r} a token outside 0..{size - 1}."
                if document.tokens is None
                else f"{document.name!r} has a token outside 0..{size - 1}; give the tokenizer it was encoded with.",
            )
        if mask is not None and mask.shape != ids.shape:
            refuse("documents", f"{document.name!r} has {len(ids)} tokens and {len(mask)} values of loss_mask.")
        yield Piece(part.split, document.name, part.first, part.last, ids.astype(dtype), mask, length)


def encode_continuation(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text as they are where it goes on: some tokenizers put a space before one that begins.

    Args:
        text: The text.
        tokenizer: Turns text into token ids.
    """
    line, whole = (ids.tolist() for ids in tokenizer.encode_batch(["\n", f"\n{text}"]))
    if whole[: len(line)] == line:
        return list(whole[len(line) :])
    (alone,) = tokenizer.encode_batch([text])
    return list(alone.tolist())
