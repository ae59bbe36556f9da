"""The interface of data sets that the loaders order, and the order."""

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray: TypeAlias = npt.NDArray[np.int64]


class TokenRows(ABC):
    """A source of training rows, each with an id that determines its tokens.

    Attributes:
        num_rows: Rows of an epoch, the same for every epoch.
    """

    num_rows: int

    def epoch_ids(self, generator: np.random.Generator) -> IntArray:
        """Return the ids of one epoch, ``(num_rows,)``, in training order: every row once, shuffled.

        Args:
            generator: The only source of randomness.
        """
        return generator.permutation(self.num_rows)

    def fixed_ids(self) -> IntArray:
        """Return the ids for evaluation, in an order that never changes: every row once."""
        return np.arange(self.num_rows)

    @abstractmethod
    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return the rows of these ids as one batch.

        Args:
            ids: ``(B,)``, from ``epoch_ids`` or ``fixed_ids``.
        """

    @abstractmethod
    def digest(self) -> str:
        """Return a short hash of everything but the seed that the order of an epoch depends on."""


class EpochOrder:
    """The order of training: row ids as a pure function of (seed, epoch, position in the epoch).

    Args:
        rows: Rows to order.
        seed: Another seed is another order.
    """

    def __init__(self, *, rows: TokenRows, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self._epoch = -1
        self._ids: IntArray = np.empty(0, dtype=np.int64)

    def __call__(self, epoch: int, position: int, count: int) -> IntArray:
        """Return ``count`` row ids from ``position`` of an epoch on.

        Args:
            epoch: Counted from 0.
            position: Rows of this epoch that come before, over all processes.
            count: How many ids.
        """
        if epoch != self._epoch:
            self._ids = self.rows.epoch_ids(np.random.default_rng([self.seed, epoch]))
            self._epoch = epoch
        return self._ids[position : position + count]


def evenly_spread(ids: IntArray, limit: int | None) -> IntArray:
    """Keep at most ``limit`` ids, at even distances.

    Args:
        ids: In order.
        limit: How many to keep; all if ``None``.
    """
    if limit is None or limit >= len(ids):
        return ids
    return ids[(2 * np.arange(limit) + 1) * len(ids) // (2 * limit)]
