"""Prompts from a token stream, or from held-out batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtp_modules.core.checks import refuse, whole
from mtp_modules.data.corpus import TokenStream
from mtp_modules.data.rows import IntArray


def pick_prompts(
    stream: TokenStream, *, count: int, length: int, seed: int, line_end: int | None = None, special: Sequence[int] = ()
) -> list[list[int]]:
    """Sample prompts that start at the beginning of a line, each from a different document while there are enough.

    After one prompt from every document comes a second one, and so on; no place is sampled twice. Prompts from
    documents without a suitable line start anywhere.

    Args:
        stream: Where to sample from.
        count: How many prompts.
        length: Tokens of each.
        seed: Another seed gives other prompts.
        line_end: The token after which a line starts; ``None`` if the tokenizer has none.
        special: Tokens that no prompt may contain, such as the end token.

    Raises:
        ValueError: If a number is below 1, or there are fewer prompts.
    """
    whole("prompts", "count", count, 1)
    whole("prompts", "length", length, 1)
    generator = np.random.default_rng([seed, length])
    starts = _document_places(stream, length, special)
    order = generator.permutation(len(starts))
    queues = [_lines_first(stream, starts[document], line_end, generator) for document in order]
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
    stream: TokenStream, candidates: IntArray, line_end: int | None, generator: np.random.Generator
) -> IntArray:
    shuffled = generator.permutation(candidates)
    if line_end is None:
        return shuffled
    before = stream.tokens[shuffled - 1]
    at_line_start = (before == line_end) | np.isin(shuffled, stream.document_starts)
    return np.concatenate([shuffled[at_line_start], shuffled[~at_line_start]])
