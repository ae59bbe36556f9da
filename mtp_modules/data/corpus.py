"""From documents to one token stream a split. Pure functions, without Lightning."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import fraction, refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, skipped_sentence
from mtp_modules.data.encoding import Piece, encode_documents, token_type
from mtp_modules.data.rows import IntArray
from mtp_modules.data.sources import sources_of

SPLITS = ("train", "val", "test")
"""The splits of a corpus."""

SHARED = "sources"
"""The sources that are divided among the splits by shares."""

Sources: TypeAlias = Mapping[str, Sequence[DocumentSource]]
"""Sources of each split, and under ``SHARED`` those that are divided among them."""

_LINE_SEARCH = 4096
_MOST_IN_MEMORY = 2**29


@dataclass(frozen=True)
class TokenStream:
    """Concatenated documents.

    Attributes:
        tokens: All token ids, ``uint16`` or ``uint32``: an array, or shards that are indexed like one.
        document_starts: Where each document starts; ascending from 0.
        names: Name of each document.
        loss_mask: False at tokens that are not trained on; ``None`` if all are.
        hashes: Of the tokens of each document.
        known_digest: The digest, if it is known without reading the tokens.
    """

    tokens: Any
    document_starts: IntArray
    names: Sequence[str]
    loss_mask: Any = None
    hashes: npt.NDArray[np.uint64] | None = None
    known_digest: str | None = None

    def digest(self) -> str:
        """Return a short hash of the tokens, the document boundaries and the loss mask."""
        if self.known_digest is not None:
            return self.known_digest
        state = hashlib.blake2b(digest_size=16)
        for values in (self.tokens, self.document_starts, self.loss_mask):
            for start in range(0, 0 if values is None else len(values), 2**24):
                state.update(np.ascontiguousarray(values[start : start + 2**24]).data)
        return state.hexdigest()


class SplitBuffer:
    """Collects the pieces of one split.

    Args:
        dtype: Of token ids.
        open_digest: Of the document that an earlier buffer ended in; empty if it ended with a whole one.
    """

    def __init__(self, dtype: type[np.unsignedinteger[Any]], open_digest: bytes = b"") -> None:
        self.dtype = dtype
        self.num_tokens = 0
        self.open_digest = open_digest
        self._tokens: list[npt.NDArray[np.integer[Any]]] = []
        self._masks: list[npt.NDArray[np.bool_]] = []
        self.starts: list[int] = []
        self.names: list[str] = []
        self.hashes: list[int] = []
        self.masked = False

    def add(self, piece: Piece) -> None:
        """Add a piece; one without tokens is left out.

        Args:
            piece: In order.
        """
        if not len(piece.tokens):
            return
        if piece.first:
            self.starts.append(self.num_tokens)
            self.names.append(piece.name)
            self.open_digest = b""
        content = self.open_digest + piece.tokens.tobytes()
        self.open_digest = hashlib.blake2b(content, digest_size=8).digest()
        if piece.last:
            self.hashes.append(int.from_bytes(self.open_digest, "little"))
        self.masked |= piece.loss_mask is not None
        mask = np.ones(len(piece.tokens), dtype=bool) if piece.loss_mask is None else piece.loss_mask
        self._tokens.append(piece.tokens)
        self._masks.append(mask)
        self.num_tokens += len(piece.tokens)

    def tokens(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return all tokens in one array."""
        return np.concatenate([np.empty(0, dtype=self.dtype), *self._tokens])

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return the loss mask of all tokens."""
        return np.concatenate([np.empty(0, dtype=bool), *self._masks])

    def stream(self) -> TokenStream:
        """Return what was added."""
        return TokenStream(
            self.tokens(),
            np.array(self.starts, dtype=np.int64),
            tuple(self.names),
            self.mask() if self.masked else None,
            np.array(self.hashes, dtype=np.uint64),
        )


def split_of(key: str, *, val_share: float, test_share: float) -> str:
    """Return the split of a document: a pure function of its key and the shares.

    Adding or removing other documents never changes it.

    Args:
        key: Of the document: the path of a file relative to its source, or the content of a record.
        val_share: Share of the documents for validation.
        test_share: Share of the documents for testing.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def check_shares(val_share: float, test_share: float) -> None:
    """Reject shares that leave nothing to train on.

    Raises:
        ValueError: If a share lies outside [0, 1], or their sum is not below 1.
    """
    fraction("TextDataModule", "val_share", val_share)
    fraction("TextDataModule", "test_share", test_share)
    if val_share + test_share >= 1:
        refuse(
            "TextDataModule",
            f"val_share + test_share must be below 1, got {val_share} + {test_share}; leave some text to train on.",
        )


def effective_shares(sources: Sources, *, val_share: float, test_share: float) -> dict[str, float]:
    """Return the share of each split in the divided sources; 0 for splits with sources of their own.

    Args:
        sources: Of the corpus.
        val_share: Share of the documents for validation.
        test_share: Share of the documents for testing.

    Raises:
        ValueError: If the shares leave nothing to train on.
    """
    check_shares(val_share, test_share)
    given = {"val": val_share, "test": test_share}
    shares = {split: 0.0 if sources.get(split) or not sources.get(SHARED) else given[split] for split in given}
    return {"train": 1.0 - sum(shares.values()) if sources.get(SHARED) else 0.0, **shares}


def assigned_documents(
    sources: Sources, tokenizer: Tokenizer, shares: Mapping[str, float]
) -> Iterator[tuple[str, Document]]:
    """Yield every document with its split.

    Args:
        sources: Of the corpus.
        tokenizer: Of the model.
        shares: Of each split in the divided sources.

    Raises:
        ValueError: If a source does not give documents.
    """
    for given, parts in sources.items():
        for source in parts:
            for document in source.documents(tokenizer):
                key = document.name if document.key is None else document.key
                divided = given == SHARED
                yield (
                    split_of(key, val_share=shares["val"], test_share=shares["test"]) if divided else given,
                    document,
                )


def read_streams(
    sources: Sources, tokenizer: Tokenizer, *, val_share: float, test_share: float
) -> dict[str, TokenStream]:
    """Read and encode all documents into memory.

    Args:
        sources: Of the corpus.
        tokenizer: Turns text into token ids.
        val_share: Share of the documents of the divided sources for validation.
        test_share: Share of the documents of the divided sources for testing.

    Raises:
        ValueError: If a source or a share is invalid, a split gets no document, or the text is too long for memory.
    """
    shares = effective_shares(sources, val_share=val_share, test_share=test_share)
    buffers = {split: SplitBuffer(token_type(tokenizer.vocab_size)) for split in splits_of(sources, shares)}
    total = 0
    for piece in encode_documents(assigned_documents(sources, tokenizer, shares), tokenizer):
        buffers[piece.split].add(piece)
        total += len(piece.tokens)
        if total > _MOST_IN_MEMORY:
            refuse(
                "TextDataModule",
                f"the text has more than {_MOST_IN_MEMORY} tokens, which are kept in memory; give cache, a folder for "
                "tokens on disk.",
            )
    return finished({split: buffer.stream() for split, buffer in buffers.items()}, sources, shares, tokenizer)


def splits_of(sources: Sources, shares: Mapping[str, float]) -> list[str]:
    """Return the splits that a corpus has.

    Args:
        sources: Of the corpus.
        shares: Of each split in the divided sources.
    """
    return [split for split in SPLITS if shares[split] > 0 or sources.get(split)]


def finished(
    streams: Mapping[str, TokenStream], sources: Sources, shares: Mapping[str, float], tokenizer: Tokenizer
) -> dict[str, TokenStream]:
    """Cut a single document where the shares are of one, and reject a split that got no document.

    Args:
        streams: Of each split.
        sources: Of the corpus.
        shares: Of each split in the divided sources.
        tokenizer: Of the model.

    Raises:
        ValueError: If a split got no document.
    """
    divided = [split for split in streams if shares[split] > 0]
    count = sum(len(streams[split].document_starts) for split in divided)
    if count == 1 and len(divided) > 1 and not sources.get("train"):
        whole = next(streams[split] for split in divided if len(streams[split].document_starts))
        return {**streams, **_cut(whole, {split: shares[split] for split in divided}, tokenizer)}
    for split in divided:
        if count and not len(streams[split].document_starts):
            remedy = (
                "lower the other shares"
                if split == "train"
                else f"raise {split}_share, give {split} sources of its own, or set the share to 0 to go without"
            )
            refuse(
                "TextDataModule",
                f"the {split} split got none of the {count} documents; add documents, {remedy}.",
            )
    return dict(streams)


def _cut(whole: TokenStream, shares: Mapping[str, float], tokenizer: Tokenizer) -> dict[str, TokenStream]:
    """Give each split its share of a single document, in order, cut at line starts where there are any."""
    starts_line = line_starts(tokenizer)
    splits, places, reached = list(shares), [0], 0.0
    for split in splits[:-1]:
        reached += shares[split]
        place = round(reached * len(whole.tokens))
        following = whole.tokens[max(place - 1, 0) : place - 1 + _LINE_SEARCH]
        places.append(next((place + step for step, token in enumerate(following) if starts_line(int(token))), place))
    places.append(len(whole.tokens))
    return {
        split: replace(
            whole,
            tokens=whole.tokens[start:end],
            loss_mask=None if whole.loss_mask is None else whole.loss_mask[start:end],
            hashes=None,
            known_digest=None if whole.known_digest is None else f"{whole.known_digest}-{start}-{end}",
        )
        for split, start, end in zip(splits, places, places[1:], strict=False)
    }


def line_starts(tokenizer: Tokenizer) -> Callable[[int], bool]:
    """Return a function that tells whether a line starts after a token.

    Args:
        tokenizer: Of the tokens.
    """
    known: dict[int, bool] = {}

    def starts(token: int) -> bool:
        if token not in known:
            known[token] = tokenizer.decode([token]).endswith("\n")
        return known[token]

    return starts


def duplicates(streams: Mapping[str, TokenStream]) -> list[str]:
    """Return one sentence for each two splits that share documents: how many, and the first by name.

    Args:
        streams: Of each split.
    """
    told = []
    found = {split: stream for split, stream in streams.items() if stream.hashes is not None}
    for index, (split, stream) in enumerate(found.items()):
        for other, following in list(found.items())[index + 1 :]:
            assert stream.hashes is not None
            assert following.hashes is not None
            (places,) = np.isin(following.hashes, stream.hashes).nonzero()
            if len(places):
                (first,) = (stream.hashes == following.hashes[places[0]]).nonzero()
                told.append(
                    f"{len(places)} of the {len(following.names)} documents of the {other} split are also in the "
                    f"{split} split, such as {following.names[places[0]]!r}, which equals {stream.names[first[0]]!r}."
                )
    return told


def load_splits(
    sources: Sequence[DocumentSource | str],
    tokenizer: Tokenizer,
    *,
    val_share: float = 0.05,
    test_share: float = 0.05,
) -> dict[str, TokenStream]:
    """Read, split and encode: the corpus of :class:`TextDataModule` for use without Lightning.

    Args:
        sources: Sources, or files, folders and glob patterns, or the word ``stdlib``.
        tokenizer: Turns the text into token ids.
        val_share: Share of the documents for validation.
        test_share: Share of the documents for testing.

    Raises:
        ValueError: If a source or a share is invalid.
    """
    given = {SHARED: sources_of("load_splits", sources)}
    streams = read_streams(given, tokenizer, val_share=val_share, test_share=test_share)
    for sentence in said_of(given.values(), streams):
        warnings.warn(sentence, stacklevel=2)
    return streams


def said_of(sources: Iterable[Sequence[DocumentSource]], streams: Mapping[str, TokenStream]) -> list[str]:
    """Return what a user should know of a corpus: what was left out, and what is in two splits.

    Args:
        sources: After they were read.
        streams: Of each split.
    """
    skipped = [skipped_sentence(source) for part in sources for source in part]
    return [*(sentence for sentence in skipped if sentence is not None), *duplicates(streams)]
