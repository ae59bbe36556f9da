"""The number of targets in one optimizer step, over ranks and accumulated batches."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed import ProcessGroup

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.targets import count_targets
from mtp_modules.data.counts import COUNTS_AHEAD


def data_parallel(trainer: Trainer) -> tuple[int, ProcessGroup | None]:
    """Return how many processes read different rows, and their group (``None`` for all processes).

    Args:
        trainer: Of the run; processes that share one model by tensor parallelism count as one.
    """
    numbers = trainer.distributed_sampler_kwargs
    if numbers is None:
        return 1, None
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return int(numbers["num_replicas"]), None if mesh is None else mesh["data_parallel"].get_group()


class StepCounts:
    """The number of valid targets per horizon in all batches of an optimizer step, known from its first batch on.

    Args:
        trainer: Of the run.
        horizons: Offsets of the heads.
    """

    def __init__(self, trainer: Trainer, horizons: Sequence[int]) -> None:
        self.trainer, self.horizons = trainer, tuple(horizons)
        self.replicas, self.group = data_parallel(trainer)
        self._counts: Tensor | None = None

    @property
    def parts(self) -> int:
        """Number of losses that the trainer averages but that must be added: ranks times accumulated batches."""
        return self.replicas * self.trainer.accumulate_grad_batches

    def __call__(self, batch: dict[str, Any], batch_idx: int) -> Int[Tensor, " H"] | None:
        """Return the counts, or ``None`` where the step consists of this batch alone.

        Args:
            batch: With ``counts_ahead`` if several batches are accumulated.
            batch_idx: Index of the batch in its epoch, which decides where steps end.

        Raises:
            ValueError: If batches are accumulated and the first one does not carry the counts of the others.
        """
        if self.parts == 1:
            return None
        accumulated = self.trainer.accumulate_grad_batches
        if self._counts is None or batch_idx % accumulated == 0:
            left = min(accumulated - batch_idx % accumulated, self.trainer.num_training_batches - batch_idx)
            self._counts = self._local(batch, int(left))
            if self.replicas > 1:
                torch.distributed.all_reduce(self._counts, group=self.group)
        return self._counts

    def _local(self, batch: dict[str, Any], batches: int) -> Tensor:
        if COUNTS_AHEAD in batch and len(batch[COUNTS_AHEAD]) >= batches:
            counts: Tensor = batch[COUNTS_AHEAD][:batches].sum(dim=0)
            return counts
        if self.trainer.accumulate_grad_batches > 1:
            refuse(
                "accumulate_grad_batches",
                f"is {self.trainer.accumulate_grad_batches}, but the batches do not carry the target counts of "
                "those that follow; use a data module of mtp_modules, or wrap the training loader in "
                "mtp_modules.data.CountsAhead(loader, horizons=model.horizons, batches=accumulate_grad_batches).",
            )
        return count_targets(batch["tokens"], self.horizons, batch.get("document_ids"), batch.get("loss_mask"))


def run_length(trainer: Trainer) -> int:
    """Return how many optimizer steps the run will take.

    Args:
        trainer: Of the run.

    Raises:
        ValueError: If the run has no end.
    """
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        refuse("max_steps", "is not given, so schedules cannot know how long the run is; set max_steps or max_epochs.")
    return int(total)
