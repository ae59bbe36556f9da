"""The most frequent tokens of a corpus."""

import numpy as np
import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.data.rows import TokenRows, evenly_spread

_ROWS, _MOST_ROWS = 256, 1 << 16


def token_counts(rows: TokenRows, vocab_size: int) -> Int[Tensor, " V"]:
    """Count every token of a data set, or of 65,536 rows evenly spread over it.

    Args:
        rows: Of a data module.
        vocab_size: Number ``V`` of token ids.
    """
    ids = evenly_spread(rows.fixed_ids(), _MOST_ROWS)
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for part in np.array_split(ids, -(-len(ids) // _ROWS)):
        tokens = rows.batch(part)["tokens"]
        counts += tokens[tokens >= 0].bincount(minlength=vocab_size)  # negative ids are no targets
    return counts


def frequent_tokens(rows: TokenRows, size: int, *, vocab_size: int) -> list[int]:
    """Return the most frequent tokens of a data set, ascending; among equals, those with the smaller ids.

    For :meth:`mtp_modules.MTPModel.trim_drafts`.

    Args:
        rows: Of a data module, such as ``data.rows("train")``.
        size: How many.
        vocab_size: Number ``V`` of token ids.

    Raises:
        ValueError: If ``size`` lies outside the vocabulary.
    """
    if not 1 <= size <= vocab_size:
        refuse("frequent_tokens", f"size must lie in 1..{vocab_size}, the vocabulary, got {size}.")
    order = token_counts(rows, vocab_size).argsort(descending=True, stable=True)
    found: list[int] = order[:size].sort().values.tolist()
    return found
