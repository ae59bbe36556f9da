"""Prompts of the held-out files that share no stretch of tokens with the training files.

Files of a corpus repeat one another: licences, generated tables, classes that are written again and again. So a prompt
of a held-out file can be in the training text all the same.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mtp_modules.data import TextDataModule


def stretches(tokens: Sequence[int], length: int) -> Iterable[bytes]:
    """Return all runs of ``length`` tokens."""
    ids = np.asarray(tokens, dtype=np.uint32)
    return (ids[start : start + length].tobytes() for start in range(len(ids) - length + 1))


def held_out_prompts(data: TextDataModule, count: int, length: int, shared: int) -> list[list[int]]:
    """Return prompts of the test split.

    Args:
        data: With training and test text.
        count: How many.
        length: Tokens of each.
        shared: Leave out prompts of which so many tokens in a row are in the training text; none is left out if 0.
    """
    if not shared:
        return data.prompts("test", count, length, 0)
    rows = data.rows("train")
    assert rows is not None
    known, asked = set(stretches(rows.stream.tokens, shared)), count
    while True:
        prompts = data.prompts("test", asked, length, 0)
        kept = [prompt for prompt in prompts if known.isdisjoint(stretches(prompt, shared))]
        if len(kept) >= count:
            return kept[:count]
        asked *= 2
