"""The number of targets in one optimizer step, and its loss, over ranks and accumulated batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed import ProcessGroup

from mtp_modules.core.checks import refuse
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.data.counts import COUNTS_AHEAD, counts_of
from mtp_modules.data.module import accumulation_scheduler, most_accumulated
from mtp_modules.metrics.functional import counts, figures


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


class StepFigures:
    """Loss and counts of a whole optimizer step: all of its accumulated batches, on all ranks.

    The batches add up on the device; only :meth:`total` exchanges numbers, so that a step that is not logged costs
    nothing.

    Args:
        replicas: How many processes read different rows.
        group: Their group; ``None`` for all processes.
        top_k: Values of ``k`` for top-k accuracy.
    """

    def __init__(self, replicas: int, group: ProcessGroup | None, top_k: tuple[int, ...]) -> None:
        self.replicas, self.group, self.top_k = replicas, group, top_k
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: LossTerms) -> None:
        """Add a batch.

        Args:
            terms: Its loss, as a part of the loss of the step, and what metrics need.
        """
        found = {"loss": terms.loss.detach(), **counts(terms, self.top_k)}
        self._sums = {name: value + self._sums[name] for name, value in found.items()} if self._sums else found

    def total(self) -> dict[str, Tensor]:
        """Return what is logged of the step, and begin the next one; every rank must call."""
        sums, self._sums = self._sums, {}
        if self.replicas > 1:
            flat = torch.cat([value.flatten().double() for value in sums.values()])  # counts stay exact
            torch.distributed.all_reduce(flat, group=self.group)
            parts = torch.split(flat, [value.numel() for value in sums.values()])
            sums = {name: part.view_as(sums[name]).to(sums[name].dtype) for name, part in zip(sums, parts, strict=True)}
        loss = sums.pop("loss").float()
        return {"loss": loss, **figures(sums, self.top_k)}


class StepCounts:
    """The number of valid targets per horizon in all batches of an optimizer step, known from its first batch on.

    Args:
        trainer: Of the run.
        horizons: Offsets of the heads.
        top_k: Values of ``k`` for top-k accuracy.
        objectives: Counts the examples of auxiliary objectives in a batch, behind those of the horizons.

    Attributes:
        figures: Loss and metrics of the step, where batches are added to them.
    """

    def __init__(
        self,
        trainer: Trainer,
        horizons: Sequence[int],
        top_k: tuple[int, ...] = (1,),
        objectives: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        self.trainer, self.horizons, self.objectives = trainer, tuple(horizons), objectives
        self.replicas, self.group = data_parallel(trainer)
        self.figures = StepFigures(self.replicas, self.group, top_k)
        self._counts: Tensor | None = None

    @property
    def parts(self) -> int:
        """Number of losses that the trainer averages but that must be added: ranks times accumulated batches."""
        return self.replicas * self.trainer.accumulate_grad_batches

    def __call__(self, batch: dict[str, Any], batch_idx: int) -> Int[Tensor, " N"] | None:
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
        if most_accumulated(self.trainer) > 1:
            refuse(
                "accumulate_grad_batches",
                f"is {most_accumulated(self.trainer)}, but the batches do not carry the target counts of "
                "those that follow; use a data module of mtp_modules, or wrap the training loader in "
                "mtp_modules.data.CountsAhead(loader, horizons=model.horizons, batches=accumulate_grad_batches).",
            )
        return counts_of(batch, self.horizons, self.objectives)


def run_length(trainer: Trainer) -> int:
    """Return how many optimizer steps the run will take.

    Args:
        trainer: Of the run.

    Raises:
        ValueError: If the run has no end.
    """
    total = trainer.estimated_stepping_batches
    scheduler, batches, epochs = accumulation_scheduler(trainer), trainer.num_training_batches, trainer.max_epochs
    if scheduler is not None and batches != float("inf") and epochs is not None and epochs >= 0:
        # Lightning's number holds if every epoch accumulates as many batches as the first.
        steps = sum(math.ceil(batches / scheduler.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
        total = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    if total == float("inf"):
        refuse("max_steps", "is not given, so schedules cannot know how long the run is; set max_steps or max_epochs.")
    return int(total)
