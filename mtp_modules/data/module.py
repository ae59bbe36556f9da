"""The common base of data modules: loaders for one process, and exact resume."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from mtp_modules.core.checks import whole
from mtp_modules.core.shapes import Tensor
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.counts import CountsAhead
from mtp_modules.data.loaders import EvalLoader, Progress, TrainLoader
from mtp_modules.data.resumable import ResumableLoader
from mtp_modules.data.rows import EpochOrder, TokenRows


def accumulation_scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    """Return the callback that changes the number of accumulated batches from epoch to epoch, if there is one.

    Args:
        trainer: Of the run.
    """
    found = (each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler))  # type: ignore[attr-defined]
    return next(found, None)


def most_accumulated(trainer: Trainer) -> int:
    """Return the largest number of batches that one optimizer step of the run accumulates.

    Args:
        trainer: Of the run.
    """
    scheduler = accumulation_scheduler(trainer)
    planned = () if scheduler is None else scheduler.scheduling.values()
    return max([trainer.accumulate_grad_batches, *planned])


class TokenDataModule(LightningDataModule, ABC):
    """Provides batches ``{"tokens": (B, T + lookahead)}``, with ``document_ids`` where a row holds several documents.

    It depends on the model only through its constructor arguments. Every process reads its own part of each step,
    regardless of the trainer's ``use_distributed_sampler``. A checkpoint holds the position in the data, so that a
    resumed run reads exactly the batches of an uninterrupted one.

    Args:
        batch_size: Rows of a batch of one process.
        seed: Another seed is another order.
        num_workers: Worker processes that prepare batches; cutting windows is cheap, 0 is usually right.
        max_eval_rows: Evaluate on at most so many rows, evenly spread.
        augmentation: Changes training rows; none if ``None``.

    Raises:
        ValueError: If a size is invalid.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        num_workers: int,
        max_eval_rows: int | None,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        whole(self, "batch_size", batch_size, 1)
        whole(self, "seed", seed, 0)
        whole(self, "num_workers", num_workers, 0)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.augmentation = augmentation
        self._max_eval_rows = max_eval_rows
        self._counted_horizons: tuple[int, ...] | None = None
        self._counted_objectives: Callable[[dict[str, Any]], Tensor] | None = None
        self._train_loader: TrainLoader | None = None
        self._train_loader_trainer: Any = None
        self._resume_from: Progress | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number ``V`` of token ids."""

    @abstractmethod
    def rows(self, split: str) -> TokenRows | None:
        """Return the rows of a split, or ``None`` if it is left out.

        Args:
            split: ``train``, ``val`` or ``test``.
        """

    def training_rows(self) -> TokenRows:
        """Return the rows of the training split."""
        rows = self.rows("train")
        assert rows is not None
        return rows

    def count_ahead(
        self, horizons: Sequence[int], objectives: Callable[[dict[str, Any]], Tensor] | None = None
    ) -> None:
        """Add the target counts of the following batches to training batches, where the trainer accumulates gradients.

        :class:`~mtp_modules.training.MTPModule` calls this when a fit begins; see :class:`CountsAhead`.

        Args:
            horizons: Offsets of the heads.
            objectives: Counts the examples of auxiliary objectives in a batch.
        """
        self._counted_horizons, self._counted_objectives = tuple(horizons), objectives

    def train_dataloader(self) -> TrainLoader | ResumableLoader | CountsAhead:
        """Return the training batches of this process, from the current position of training."""
        loader = self._training_loader()
        accumulated = 1 if self.trainer is None else most_accumulated(self.trainer)
        if self._counted_horizons is None or accumulated == 1:
            return loader if isinstance(loader, TrainLoader) else ResumableLoader(loader)
        return CountsAhead(
            loader, horizons=self._counted_horizons, batches=accumulated, objectives=self._counted_objectives
        )

    def _training_loader(self) -> TrainLoader | EvalLoader:
        rows = self.training_rows()
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            return self._eval_loader(rows, limit=None)
        if self._train_loader is not None and self.trainer is not None and self.trainer is self._train_loader_trainer:
            self._resume_from = self._train_loader.state_dict()
        rank, world_size = self._rank_and_world_size()
        loader = TrainLoader(
            order=EpochOrder(rows=rows, seed=self.seed),
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            processed=None if self.trainer is None else self._processed_batches,
            augmentation=self.augmentation,
        )
        if self._resume_from is not None:
            loader.load_state_dict(self._resume_from)
        self._train_loader, self._train_loader_trainer, self._resume_from = loader, self.trainer, None
        return loader

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """Return the validation batches of this process; no loader if the split is empty."""
        rows = self.rows("val")
        return [] if rows is None else self._eval_loader(rows, self._max_eval_rows)

    def test_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """Return the test batches of this process; no loader if the split is empty."""
        rows = self.rows("test")
        return [] if rows is None else self._eval_loader(rows, self._max_eval_rows)

    def predict_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """Return the test batches."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of training in the data, for a checkpoint."""
        if self._train_loader is None:
            return {} if self._resume_from is None else dict(self._resume_from)
        return dict(self._train_loader.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue training from a saved position.

        Args:
            state_dict: Result of ``state_dict``.
        """
        self._resume_from = Progress(
            epoch=int(state_dict["epoch"]), position=int(state_dict["position"]), order=str(state_dict["order"])
        )
        self._train_loader = None

    def _eval_loader(self, rows: TokenRows, limit: int | None) -> EvalLoader:
        rank, world_size = self._rank_and_world_size()
        return EvalLoader(
            rows=rows,
            batch_size=self.batch_size,
            limit=limit,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        # From the strategy, because the processes of a tensor-parallel group must read the same rows.
        numbers = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if numbers is None else (int(numbers["rank"]), int(numbers["num_replicas"]))

    def _processed_batches(self) -> int:
        assert self.trainer is not None
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)
