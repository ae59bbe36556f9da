"""The hidden states of a frozen trunk, kept on disk beside the rows that they belong to."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Tensor
from mtp_modules.data.rows import IntArray, TokenRows, evenly_spread

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CachedStates(Component):
    """Where the training windows' hidden states are kept, so that heads are trained without running the trunk again.

    For a frozen trunk only. When a fit begins, :class:`~mtp_modules.training.MTPModule` lets its trunk read what is
    missing on disk, window by window, and goes on where it was stopped; later runs, of any heads, read a memory-mapped
    file. Batches carry the states as ``hidden``, and those of the trunk's ``feature_layers``, if it names any, as
    ``features``. The trunk reads in the trainer's precision: ``bf16-mixed`` is faster where the processor multiplies
    bfloat16. A folder belongs to one trunk, its feature layers, one text, one cut of it, and one such precision.

    Args:
        folder: Made if it is not there.
        dtype: Precision on disk: ``float16``, ``bfloat16`` or ``float32``.
        max_windows: Train on at most so many windows, evenly spread over the text; all if ``None``.
        rows_per_pass: Windows that the trunk reads at once.

    Raises:
        ValueError: If the precision is unknown or a number below 1.
    """

    def __init__(
        self, *, folder: str, dtype: str = "float16", max_windows: int | None = None, rows_per_pass: int = 4
    ) -> None:
        if dtype not in DTYPES:
            refuse(self, f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if max_windows is not None:
            at_least(self, "max_windows", max_windows, 1)
        at_least(self, "rows_per_pass", rows_per_pass, 1)
        self.folder, self.dtype, self.max_windows, self.rows_per_pass = Path(folder), dtype, max_windows, rows_per_pass


class CachedRows(TokenRows):
    """Rows with the hidden states of a frozen trunk beside them, once it has read them.

    Args:
        rows: Where tokens come from.
        window: Positions ``T`` of a row that the trunk reads.
        kept: Where the states are kept, and of how many rows.
    """

    def __init__(self, rows: TokenRows, *, window: int, kept: CachedStates) -> None:
        self.source, self.window, self.kept = rows, window, kept
        self._ids = evenly_spread(rows.fixed_ids(), kept.max_windows)
        self.num_rows = len(self._ids)
        self._states: Tensor | None = None

    def hold(self, states: Tensor) -> None:
        """Take the states that batches carry from now on.

        Args:
            states: ``(rows, 1 + F, T, D)``, in the order of ``fixed_ids``: the last state, then those of the feature
                layers.
        """
        assert len(states) == self.num_rows
        self._states = states

    def epoch_ids(self, generator: np.random.Generator) -> IntArray:
        """Shuffle."""
        return generator.permutation(self._ids)

    def fixed_ids(self) -> IntArray:
        """Return the ids in order."""
        return self._ids

    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return tokens, ``hidden`` ``(B, T, D)``, and ``features`` ``(B, F, T, D)``, in the precision on disk.

        Tokens alone, as long as no trunk has read the rows.
        """
        batch = self.source.batch(ids)
        if self._states is None:
            return batch
        states = self._states[torch.from_numpy(np.searchsorted(self._ids, ids))]
        batch = {**batch, "hidden": states[:, 0]}
        return {**batch, "features": states[:, 1:]} if states.shape[1] > 1 else batch

    def digest(self) -> str:
        """Return a hash of the rows and of which they are."""
        return hashlib.blake2b(f"{self.source.digest()}{self._ids.tolist()}".encode(), digest_size=16).hexdigest()
