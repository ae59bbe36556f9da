"""Target counts of the following batches, which gradient accumulation needs before its first backward pass."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_modules.core.checks import whole
from mtp_modules.core.targets import count_targets
from mtp_modules.data.resumable import ResumableLoader

COUNTS_AHEAD = "counts_ahead"
"""Key of a batch with the counts of itself and of those that follow, ``(batches, H)``, auxiliary objectives behind."""


def counts_of(
    batch: dict[str, Any], horizons: Sequence[int], objectives: Callable[[dict[str, Any]], Tensor] | None = None
) -> Tensor:
    """Return the valid targets of each horizon in a batch, and the examples of each auxiliary objective.

    Args:
        batch: With ``tokens``, and optionally ``document_ids`` and ``loss_mask``.
        horizons: Offsets of the heads.
        objectives: Counts the examples of auxiliary objectives.
    """
    counts = count_targets(batch["tokens"], horizons, batch.get("document_ids"), batch.get("loss_mask"))
    return counts if objectives is None else torch.cat((counts, objectives(batch)))


class CountsAhead:
    """Read some batches ahead, and add to each the number of valid targets in it and in those that follow it.

    Accumulated batches rarely have equally many valid targets per head, because of documents, masks and small last
    batches. Their losses add up to the loss of one large batch only if all of them are divided by their total counts,
    which the first one must carry. The data modules of this package do this automatically; wrap a loader of your own.

    A resumed run continues with the first batch that was not trained on, whatever was read ahead
    (:class:`ResumableLoader`).

    Args:
        loader: Yields dictionaries with ``tokens``, and optionally ``document_ids`` and ``loss_mask``. Shard it over
            processes yourself: the trainer does not look into it.
        horizons: Offsets of the heads, ``model.horizons``.
        batches: How many to count: the number of accumulated batches.
        objectives: Counts the examples of auxiliary objectives in a batch, behind those of the horizons.

    Raises:
        ValueError: If ``batches`` is below 1.

    Example:
        >>> batches = [{"tokens": torch.zeros(rows, 4, dtype=torch.long)} for rows in (3, 1)]
        >>> [batch["counts_ahead"].tolist() for batch in CountsAhead(batches, horizons=(1, 2), batches=2)]
        [[[6, 6], [2, 2]], [[2, 2], [0, 0]]]
    """

    def __init__(
        self,
        loader: Iterable[dict[str, Any]],
        *,
        horizons: Sequence[int],
        batches: int,
        objectives: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        whole(self, "batches", batches, 1)
        self.loader, self.horizons, self.batches, self.objectives = loader, tuple(horizons), batches, objectives
        self._place = ResumableLoader(loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises Python's own TypeError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ahead: deque[tuple[dict[str, Any], Tensor]] = deque()
        for batch in self._place.batches():
            ahead.append((batch, self._count(batch)))
            if len(ahead) == self.batches:
                yield self._first(ahead)
        while ahead:
            yield self._first(ahead)

    def follow(self, trained: Callable[[], int], *, limit: float = float("inf")) -> None:
        """Learn from a trainer which batches have been trained on, see :meth:`ResumableLoader.follow`.

        Args:
            trained: Returns how many batches have been trained on since any fixed time.
            limit: Batches after which the trainer begins the next pass.
        """
        self._place.follow(trained, limit=limit)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the first batch that was not trained on."""
        return self._place.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position.

        Args:
            state_dict: Result of ``state_dict``.
        """
        self._place.load_state_dict(state_dict)

    def _count(self, batch: dict[str, Any]) -> Tensor:
        return counts_of(batch, self.horizons, self.objectives)

    def _first(self, ahead: deque[tuple[dict[str, Any], Tensor]]) -> dict[str, Any]:
        found = torch.stack([count for _, count in ahead])
        counts = torch.zeros(self.batches, found.shape[1], dtype=torch.long)
        counts[: len(ahead)] = found
        batch, _ = ahead.popleft()
        self._place.yielded += 1
        return {**batch, COUNTS_AHEAD: counts}
