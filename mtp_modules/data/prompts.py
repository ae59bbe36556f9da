"""Prompts from a token stream, or from held-out batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_modules.core.checks import refuse, whole
from mtp_modules.data.rows import IntArray
from mtp_modules.data.streams import TokenStream

_MOST_TOKENS = 2**23
"""Tokens among which prompts are looked for."""


def pick_prompts(
    stream: TokenStream,
    *,
    count: int,
    length: int,
    seed: int,
    line_ends: Sequence[int] = (),
    special: Sequence[int] = (),
) -> list[list[int]]:
    """Sample prompts that start at the beginning of a line, each from a different document while there are enough.

    After one prompt from every document comes a second one, and so on; no place is sampled twice. Prompts from
    documents without a suitable line start anywhere.

    Args:
        stream: Where to sample from.
        count: How many prompts.
        length: Tokens of each.
        seed: Another seed gives other prompts.
        line_ends: The tokens after which a line starts.
        special: Tokens that no prompt may contain, such as the end token.

    Raises:
        ValueError: If a number is below 1, or there are fewer prompts.
    """
    whole("prompts", "count", count, 1)
    whole("prompts", "length", length, 1)
    generator = np.random.default_rng([seed, length])
    stream = _some_documents(stream, generator)
    starts = _document_places(stream, length, special)
    order = generator.permutation(len(starts))
    queues = [_lines_first(stream, starts[document], line_ends, generator) for document in order]
    picked: list[int] = []
    turn = 0
    while len(picked) < count and any(turn < len(queue) for queue in queues):
        picked.extend(int(queue[turn]) for queue in queues if turn < len(queue))
        turn += 1
    if len(picked) < count:
        refuse(
            "prompts",
            f"the split has room for {len(picked)} prompts of {length} tokens, {count} were asked for; "
            "ask for fewer or shorter ones.",
        )
    return [stream.tokens[start : start + length].tolist() for start in picked[:count]]


def row_beginnings(batches: Iterable[Mapping[str, Tensor]], *, length: int) -> Iterator[list[int]]:
    """Yield the first ``length`` tokens of every row in which they belong to one document.

    Args:
        batches: With ``tokens (B, T)``, and optionally ``document_ids (B, T)``; read lazily.
        length: Tokens of each.
    """
    for batch in batches:
        tokens = batch["tokens"][:, :length]
        documents = batch.get("document_ids", torch.zeros_like(tokens))[:, :length]
        if tokens.shape[1] == length:
            yield from tokens[(documents == documents[:, :1]).all(dim=1)].tolist()


def _some_documents(stream: TokenStream, generator: np.random.Generator) -> TokenStream:
    """Return a stream that fits into memory many times: of a longer one, parts of documents at random."""
    if len(stream.tokens) <= _MOST_TOKENS:
        return replace(stream, tokens=stream.tokens[: len(stream.tokens)])  # in memory, where it is in shards
    ends = np.append(stream.document_starts[1:], len(stream.tokens))
    parts: list[npt.NDArray[Any]] = []
    left = _MOST_TOKENS
    for document in generator.permutation(len(ends)):
        start = int(stream.document_starts[document])
        parts.append(stream.tokens[start : min(int(ends[document]), start + _MOST_TOKENS // 64)])
        left -= len(parts[-1])
        if left <= 0:
            break
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return TokenStream(np.concatenate(parts), lengths.cumsum() - lengths, ())


def _document_places(stream: TokenStream, length: int, special: Sequence[int]) -> list[IntArray]:
    """Return, document by document, where ``length`` allowed tokens in a row start."""
    ends = np.append(stream.document_starts[1:], len(stream.tokens))
    forbidden = np.concatenate([[0], np.isin(stream.tokens, list(special)).cumsum()])
    places = []
    for start, end in zip(stream.document_starts, ends, strict=True):
        candidates = np.arange(start, max(start, end - length + 1), dtype=np.int64)
        places.append(candidates[forbidden[candidates + length] == forbidden[candidates]])
    return [candidates for candidates in places if len(candidates)]


def _lines_first(
    stream: TokenStream, candidates: IntArray, line_ends: Sequence[int], generator: np.random.Generator
) -> IntArray:
    shuffled = generator.permutation(candidates)
    if not line_ends:
        return shuffled
    before = stream.tokens[shuffled - 1]
    at_line_start = np.isin(before, line_ends) | np.isin(shuffled, stream.document_starts)
    return np.concatenate([shuffled[at_line_start], shuffled[~at_line_start]])
