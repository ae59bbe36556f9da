"""Accuracy of each head by position."""

import torch
from torchmetrics import Metric

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Tensor


class PositionAccuracy(Metric):
    """Top-1 accuracy of every horizon at every position.

    ``compute`` returns one list of ``H`` accuracies per position, NaN where nothing was counted. They are lists because
    torchmetrics would turn a table with a single entry into a number.

    Args:
        num_positions: Number ``T``.
        num_horizons: Number ``H``.

    Raises:
        ValueError: If a number is below 1.
    """

    full_state_update = False
    higher_is_better = True
    hits: Tensor
    count: Tensor

    def __init__(self, *, num_positions: int, num_horizons: int) -> None:
        super().__init__()
        whole(self, "num_positions", num_positions, 1)
        whole(self, "num_horizons", num_horizons, 1)
        shape = (num_positions, num_horizons)
        self.add_state("hits", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, terms: LossTerms) -> None:
        """Add the counts of a batch.

        Args:
            terms: Result of the loss in evaluation.

        Raises:
            ValueError: If the batch has another number of positions or horizons.
        """
        if terms.valid.shape[1:] != self.count.shape:
            refuse(self, f"was built for (T, H) = {tuple(self.count.shape)}, got {tuple(terms.valid.shape[1:])}.")
        self.hits = self.hits + ((terms.rank == 0) & terms.valid).sum(dim=0)
        self.count = self.count + terms.valid.sum(dim=0)

    def compute(self) -> list[list[float]]:
        """Return the table, ``T`` lists of ``H`` accuracies."""
        shares: list[list[float]] = (self.hits.double() / self.count).tolist()
        return shares
