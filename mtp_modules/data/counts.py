"""Target counts of the following batches, which gradient accumulation needs before its first backward pass."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_modules.core.checks import whole
from mtp_modules.core.targets import count_targets

COUNTS_AHEAD = "counts_ahead"
"""Key of a batch with the counts of itself and of those that follow, ``(batches, H)``."""


class CountsAhead:
    """Read some batches ahead, and add to each the number of valid targets in it and in those that follow it.

    Accumulated batches rarely have equally many valid targets per head, because of documents, masks and small last
    batches. Their losses add up to the loss of one large batch only if all of them are divided by their total counts,
    which the first one must carry. The data modules of this package do this automatically; wrap a loader of your own.


    Args:
        loader: Yields dictionaries with ``tokens``, and optionally ``document_ids`` and ``loss_mask``. Shard it over
            processes yourself: the trainer does not look into it.
        horizons: Offsets of the heads, ``model.horizons``.
        batches: How many to count: the number of accumulated batches.

    Raises:
        ValueError: If ``batches`` is below 1.

    Example:
        >>> batches = [{"tokens": torch.zeros(rows, 4, dtype=torch.long)} for rows in (3, 1)]
        >>> [batch["counts_ahead"].tolist() for batch in CountsAhead(batches, horizons=(1, 2), batches=2)]
        [[[6, 6], [2, 2]], [[2, 2], [0, 0]]]
    """

    def __init__(self, loader: Iterable[dict[str, Any]], *, horizons: Sequence[int], batches: int) -> None:
        whole(self, "batches", batches, 1)
        self.loader, self.horizons, self.batches = loader, tuple(horizons), batches
        for name in ("state_dict", "load_state_dict"):  # resumable if the loader is
            if hasattr(loader, name):
                setattr(self, name, getattr(loader, name))

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises Python's own TypeError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ahead: deque[tuple[dict[str, Any], Tensor]] = deque()
        for batch in self.loader:
            ahead.append((batch, self._count(batch)))
            if len(ahead) == self.batches:
                yield self._first(ahead)
        while ahead:
            yield self._first(ahead)

    def _count(self, batch: dict[str, Any]) -> Tensor:
        return count_targets(batch["tokens"], self.horizons, batch.get("document_ids"), batch.get("loss_mask"))

    def _first(self, ahead: deque[tuple[dict[str, Any], Tensor]]) -> dict[str, Any]:
        counts = torch.zeros(self.batches, len(self.horizons), dtype=torch.long)
        counts[: len(ahead)] = torch.stack([count for _, count in ahead])
        batch, _ = ahead.popleft()
        return {**batch, COUNTS_AHEAD: counts}
