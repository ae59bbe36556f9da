"""From documents to one token stream a split. Pure functions, without Lightning."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from mtp_modules.core.checks import fraction, refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, skipped_sentence
from mtp_modules.data.encoding import encode_documents, token_type
from mtp_modules.data.sources import sources_of
from mtp_modules.data.streams import SplitBuffer, TokenStream, duplicates

SPLITS = ("train", "val", "test")
"""The splits of a corpus."""

SHARED = "sources"
"""The sources that are divided among the splits by shares."""

Sources: TypeAlias = Mapping[str, Sequence[DocumentSource]]
"""Sources of each split, and under ``SHARED`` those that are divided among them."""

_LINE_SEARCH = 4096
_ROUNDING = 1e-12
"""Shares that add up to 1 but for this leave no document out."""
_MOST_IN_MEMORY = 2**29


def split_of(key: str, *, val_share: float, test_share: float, train_share: float | None = None) -> str | None:
    """Return the split of a document, a pure function of its key and the shares; ``None`` if it is left out.

    Adding or removing other documents never changes it, and neither does ``train_share`` the other splits.

    Args:
        key: Of the document: the path of a file relative to its source, or the content of a record.
        val_share: Share of the documents for validation.
        test_share: Share of the documents for testing.
        train_share: Share of the documents for training; what the others leave if ``None``.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_share:
        return "test"
    if place < test_share + val_share:
        return "val"
    return "train" if train_share is None or place >= 1 - train_share - _ROUNDING else None


def check_shares(val_share: float, test_share: float, train_share: float | None = None) -> None:
    """Reject shares that leave nothing to train on, or that overlap.

    Raises:
        ValueError: If a share lies outside [0, 1], those of validation and test leave nothing, or all are more than 1.
    """
    fraction("TextDataModule", "val_share", val_share)
    fraction("TextDataModule", "test_share", test_share)
    if train_share is not None:
        fraction("TextDataModule", "train_share", train_share)
        if train_share + val_share + test_share > 1:
            refuse(
                "TextDataModule",
                f"train_share + val_share + test_share must be at most 1, got {train_share} + {val_share} + "
                f"{test_share}; lower one, or leave train_share out to train on what the others leave.",
            )
    if val_share + test_share >= 1:
        refuse(
            "TextDataModule",
            f"val_share + test_share must be below 1, got {val_share} + {test_share}; leave some text to train on.",
        )


def effective_shares(
    sources: Sources, *, val_share: float, test_share: float, train_share: float | None = None
) -> dict[str, float]:
    """Return the share of each split in the divided sources; 0 for splits with sources of their own.

    Args:
        sources: Of the corpus.
        val_share: Share of the documents for validation.
        test_share: Share of the documents for testing.
        train_share: Share of the documents for training; what the others leave if ``None``.

    Raises:
        ValueError: If the shares leave nothing to train on, or overlap.
    """
    check_shares(val_share, test_share, train_share)
    given = {"val": val_share, "test": test_share}
    shares = {split: 0.0 if sources.get(split) or not sources.get(SHARED) else given[split] for split in given}
    left = 1.0 - sum(shares.values()) if train_share is None else train_share
    return {"train": left if sources.get(SHARED) else 0.0, **shares}


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
                split: str | None = given
                if given == SHARED:
                    key = document.name if document.key is None else document.key
                    split = split_of(key, **{f"{name}_share": share for name, share in shares.items()})
                if split is not None:
                    yield split, document


def read_streams(
    sources: Sources, tokenizer: Tokenizer, *, val_share: float, test_share: float, train_share: float | None = None
) -> dict[str, TokenStream]:
    """Read and encode all documents into memory.

    Args:
        sources: Of the corpus.
        tokenizer: Turns text into token ids.
        val_share: Share of the documents of the divided sources for validation.
        test_share: Share of the documents of the divided sources for testing.
        train_share: Share of the documents of the divided sources for training; what the others leave if ``None``.

    Raises:
        ValueError: If a source or a share is invalid, a split gets no document, or the text is too long for memory.
    """
    shares = effective_shares(sources, val_share=val_share, test_share=test_share, train_share=train_share)
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
            known_digest=None,
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
