"""Loaders: batches for one process out of all, and training that continues exactly where it stopped."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtp_modules.core.checks import refuse
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.rows import EpochOrder, IntArray, TokenRows, evenly_spread


class Progress(TypedDict):
    """Position of training in the data, as plain values for a checkpoint.

    Attributes:
        epoch: Completed epochs of the data.
        position: Rows read in the current epoch, over all processes.
        order: Identifies the order (data and seed) to which the two numbers refer.
    """

    epoch: int
    position: int
    order: str


class _Batch(NamedTuple):
    """Rows to load, with their epoch and their places in it."""

    ids: IntArray
    epoch: int
    places: IntArray


class _Batches(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: TokenRows, augmentation: Augmentation | None, seed: int) -> None:
        self.rows, self.augmentation, self.seed = rows, augmentation, seed

    def __getitem__(self, key: _Batch) -> dict[str, Tensor]:
        batch = self.rows.batch(key.ids)
        if self.augmentation is None:
            return batch
        return self.augmentation(batch, seed=self.seed, epoch=key.epoch, places=key.places)


def _load(
    rows: TokenRows,
    batches: Iterable[_Batch],
    num_workers: int,
    *,
    augmentation: Augmentation | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    # torch takes any iterable of keys as a sampler; a key here is a whole batch.
    return iter(
        DataLoader(
            _Batches(rows, augmentation, seed),
            sampler=batches,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # do not advance the global one, which the model uses
        )
    )


class EvalLoader:
    """Every process's equal part of the rows, in fixed order. The last batch may be smaller.

    Processes must run equally many forward passes, so up to ``world_size - 1`` rows are left out.

    Args:
        rows: Rows to evaluate on.
        batch_size: Rows of a batch.
        limit: Keep at most this number of rows over all processes, evenly spread.
        rank: Which process this is.
        world_size: How many processes there are.
        num_workers: Worker processes that prepare batches.

    Raises:
        ValueError: If there are fewer rows than processes.
    """

    def __init__(
        self,
        *,
        rows: TokenRows,
        batch_size: int,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.rows = rows
        self.num_workers = num_workers
        ids = evenly_spread(rows.fixed_ids(), limit)
        if len(ids) < world_size:
            refuse(self, f"{len(ids)} rows to evaluate are fewer than {world_size} processes; give more data.")
        mine = ids[: len(ids) - len(ids) % world_size][rank::world_size]
        self.batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # Workers start with the first batch, because the caller may still prepare the rows after it has the iterator.
        yield from _load(self.rows, [_Batch(ids, 0, ids) for ids in self.batches], self.num_workers)


class TrainLoader:
    """Batches of one endless sequence: each iteration continues at the current position, and lasts one epoch.

    The sequence is a pure function of the order's seed. A global step takes ``batch_size * world_size`` rows, its own
    part per process; rows that do not fill a last step are left out, different ones in every epoch.

    Lightning starts an epoch in the middle after a resume, ends it early at ``limit_train_batches``, and drops fetched
    batches; none of this may replay or skip rows. So the position is not inferred from Lightning's epochs: it is the
    start of the loader plus the number of batches that were actually processed.

    Args:
        order: The order of the rows.
        batch_size: Rows of a batch of one process.
        rank: Which process this is.
        world_size: How many processes there are.
        num_workers: Worker processes that prepare batches.
        processed: Returns how many batches have been trained on since any fixed time. ``None``: a batch counts
            when it is yielded.
        augmentation: Changes the rows; none if ``None``.

    Raises:
        ValueError: If an epoch has not enough rows for one step.
    """

    def __init__(
        self,
        *,
        order: EpochOrder,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        processed: Callable[[], int] | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.order = order
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.step_rows = batch_size * world_size
        if order.rows.num_rows < self.step_rows:
            refuse(
                self,
                f"the training data give {order.rows.num_rows} rows, fewer than one batch of {batch_size} on each of "
                f"{world_size} processes; lower batch_size or the window, or give more data.",
            )
        self._yielded = 0
        self.follows_training = processed is not None
        self._processed = processed or (lambda: self._yielded)
        self._start = (0, 0)
        self._processed_at_start: int | None = None

    def __len__(self) -> int:
        return self.order.rows.num_rows // self.step_rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._start = self._place()
        self._processed_at_start = self._processed()
        batches = self._next_batches(len(self))
        rows, seed = self.order.rows, self.order.seed
        for batch in _load(rows, batches, self.num_workers, augmentation=self.augmentation, seed=seed):
            self._yielded += 1
            yield batch

    def state_dict(self) -> Progress:
        """Return the current position."""
        epoch, position = self._place()
        return {"epoch": epoch, "position": position, "order": self._order_name()}

    def load_state_dict(self, state: Progress) -> None:
        """Continue from a saved position.

        If the data or the seed have changed, the position is invalid, and the next whole epoch begins.

        Args:
            state: Result of ``state_dict``.
        """
        same = state["order"] == self._order_name()
        self._start = (state["epoch"], state["position"]) if same else (state["epoch"] + 1, 0)
        self._processed_at_start = None

    def _order_name(self) -> str:
        return f"{self.order.rows.digest()}-{self.order.seed}"

    def _place(self) -> tuple[int, int]:
        epoch, position = self._start
        steps = 0 if self._processed_at_start is None else self._processed() - self._processed_at_start
        left = (self.order.rows.num_rows - position) // self.step_rows
        if steps < left:
            return epoch, position + steps * self.step_rows
        epochs, steps = divmod(steps - left, len(self))
        return epoch + 1 + epochs, steps * self.step_rows

    def _next_batches(self, count: int) -> Iterator[_Batch]:
        epoch, position = self._start
        for _ in range(count):
            if position + self.step_rows > self.order.rows.num_rows:
                epoch, position = epoch + 1, 0
            places = np.arange(position, position + self.step_rows)[self.rank :: self.world_size]
            ids = self.order(epoch, position, self.step_rows)[self.rank :: self.world_size]
            yield _Batch(ids, epoch, places)
            position += self.step_rows
