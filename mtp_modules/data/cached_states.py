"""Cache of a frozen trunk's hidden states on disk."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import TrunkOutput
from mtp_modules.core.shapes import Tensor
from mtp_modules.data.rows import IntArray, TokenRows, evenly_spread

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CachedStates(Component):
    """Cache the training windows' hidden states on disk, so that heads are trained without running the trunk again.

    For a frozen trunk only. When a fit begins, :class:`~mtp_modules.training.MTPModule` runs its trunk on the windows
    that the cache lacks, and an interrupted run continues where it stopped; later runs, with any heads, memory-map the
    file. Batches carry the states as ``hidden``, and those of the trunk's ``feature_layers``, if it has any, as
    ``features``. The trunk runs in the trainer's precision: ``bf16-mixed`` is faster on processors with bfloat16
    products. A folder belongs to one trunk, its feature layers, one text, one set of windows, and one such precision.

    Args:
        folder: Created if it does not exist.
        dtype: Precision on disk: ``float16``, ``bfloat16`` or ``float32``.
        max_windows: Train on at most this number of windows, evenly spread over the text; all if ``None``.
        rows_per_pass: Windows per forward pass of the trunk.

    Raises:
        ValueError: If the precision is unknown or a number below 1.
    """

    def __init__(
        self, *, folder: str, dtype: str = "float16", max_windows: int | None = None, rows_per_pass: int = 4
    ) -> None:
        if dtype not in DTYPES:
            refuse(self, f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if max_windows is not None:
            whole(self, "max_windows", max_windows, 1)
        whole(self, "rows_per_pass", rows_per_pass, 1)
        self.folder, self.dtype, self.max_windows, self.rows_per_pass = Path(folder), dtype, max_windows, rows_per_pass


class CachedRows(TokenRows):
    """Rows with the cached hidden states of a frozen trunk.

    Args:
        rows: Source of the tokens.
        window: Positions ``T`` of a row that the trunk reads.
        kept: Location and size of the cache.
    """

    def __init__(self, rows: TokenRows, *, window: int, kept: CachedStates) -> None:
        self.source, self.window, self.kept = rows, window, kept
        self._ids = evenly_spread(rows.fixed_ids(), kept.max_windows)
        self.num_rows = len(self._ids)
        self._states: Tensor | None = None

    def hold(self, states: Tensor) -> None:
        """Attach the states, which batches carry from now on.

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

        Tokens only, until :meth:`hold` was called.
        """
        batch = self.source.batch(ids)
        if self._states is None:
            return batch
        states = self._states[torch.from_numpy(np.searchsorted(self._ids, ids))]
        batch = {**batch, "hidden": states[:, 0]}
        return {**batch, "features": states[:, 1:]} if states.shape[1] > 1 else batch

    def digest(self) -> str:
        """Return a hash of the rows and their ids."""
        return hashlib.blake2b(f"{self.source.digest()}{self._ids.tolist()}".encode(), digest_size=16).hexdigest()


def cached_output(batch: Mapping[str, Tensor]) -> TrunkOutput | None:
    """Return the trunk's output that a batch carries; ``None`` if the trunk has to run.

    Args:
        batch: With ``hidden`` ``(B, T, D)`` and perhaps ``features`` ``(B, F, T, D)``, or without both.
    """
    if (hidden := batch.get("hidden")) is None:
        return None
    features = batch.get("features")
    return TrunkOutput(hidden, () if features is None else features.unbind(1))
