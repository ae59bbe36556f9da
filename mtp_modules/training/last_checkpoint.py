"""The checkpoint that a run resumes from, and whether the places where checkpoints go can take them."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from mtp_modules.core.checks import InputError, at_least, refuse
from mtp_modules.core.component import Component, check_describable
from mtp_modules.core.saving import check_folder, remove_partial

LAST = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Save ``last.ckpt`` after each validation, at the end of training, and every so many optimizer steps.

    Lightning's ``ModelCheckpoint`` with ``monitor`` and ``save_last`` saves ``last.ckpt`` only when the monitored
    metric improves. :class:`~mtp_modules.training.MTPModule` puts this callback in its place wherever a
    ``ModelCheckpoint`` has ``save_last``; give one of your own to save more often.

    Args:
        every_n_steps: Also save after every so many optimizer steps; never in between if ``None``.
        dirpath: Folder of the file; that of the first other checkpoint callback if ``None``, else ``checkpoints`` in
            the trainer's root folder.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, *, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        if every_n_steps is not None:
            at_least(self, "every_n_steps", every_n_steps, 1)
        self.every_n_steps, self.dirpath = every_n_steps, dirpath
        self.path: Path | None = None
        self._saved_step, self._due = -1, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, on rank 0."""
        others = (
            getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks if callback is not self
        )
        folder = self.dirpath or next(filter(None, others), None) or Path(trainer.default_root_dir, "checkpoints")
        self.path = Path(trainer.strategy.broadcast(str(folder))) / LAST
        self._saved_step, self._due = -1, False

    def save(self, trainer: Trainer) -> Path:
        """Save now; call it on all ranks, between two optimizer steps.

        Args:
            trainer: Of the run.

        Returns:
            Path of the checkpoint.
        """
        assert self.path is not None
        if self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step, self._due = trainer.global_step, False
        return self.path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save the step again that a run resumes from."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every ``every_n_steps`` steps, and after the step in which a validation came too early."""
        every, step = self.every_n_steps, trainer.global_step
        scheduled = every is not None and step % every == 0 and step != self._saved_step
        if (scheduled or self._due) and not _within_step(trainer) and not _off(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, but neither within a step, whose gradients would be lost, nor at an epoch's end."""
        if not _off(trainer):
            if _within_step(trainer) or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self._due = True
            else:
                self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch that ended with a validation, or had none."""
        if (self._due or not trainer.enable_validation) and not _off(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if not _off(trainer):
            self.save(trainer)


def replace_save_last(trainer: Trainer) -> list[Checkpoint]:
    """Turn ``save_last`` of Lightning's callbacks off, and return the callback that takes its place, if there is none.

    Args:
        trainer: Before its callbacks are set up.
    """
    wanted = [saver for saver in _model_checkpoints(trainer) if saver.save_last]
    for saver in wanted:
        saver.save_last = False
    present = any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [LastCheckpoint()] if wanted and not present else []


def check_save_folders(trainer: Trainer, module: LightningModule) -> None:
    """Raise an error before the first step if a checkpoint could not be saved later; remove what killed runs left.

    Args:
        trainer: With its callbacks set up.
        module: Whose checkpoints are saved.

    Raises:
        ValueError: If a folder cannot be written to, or has less space than the checkpoints that the run keeps there.
    """
    if _off(trainer):
        return
    if isinstance(model := getattr(module, "model", None), Component):
        _warn_of_what_cannot_be_described(model)
    # Weights, and in training the two moments that AdamW keeps of each.
    size = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in module.parameters())
    files: dict[Path, int] = {}
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None) or getattr(getattr(callback, "path", None), "parent", None)
        if folder is not None and "://" not in str(folder):
            kept = max(1, getattr(callback, "save_top_k", 1))
            files[Path(folder)] = files.get(Path(folder), 0) + kept
    for path, count in files.items():
        there = len(list(path.glob("*.ckpt"))) if path.is_dir() else 0
        check_folder("checkpoints", path, needed=size * max(1, count - there))
        remove_partial(path)


def _warn_of_what_cannot_be_described(model: Component) -> None:
    try:
        check_describable("fit", model)
    except InputError as error:
        rank_zero_warn(
            f"{error} The checkpoints of this run can be resumed by the program that made the model, but no other can "
            "load them."
        )


def check_save_points(trainer: Trainer) -> None:
    """Reject a schedule that saves in the middle of accumulated batches, whose gradients a checkpoint does not hold.

    Args:
        trainer: When training starts.

    Raises:
        ValueError: If validations, after which checkpoints are saved, or timed checkpoints do not fall between steps.
    """
    accumulated, every = trainer.accumulate_grad_batches, trainer.val_check_batch  # None: a time
    if accumulated == 1 or not _model_checkpoints(trainer) or _off(trainer):
        return
    batches = trainer.num_training_batches
    across = trainer.check_val_every_n_epoch is None
    uneven = across and batches != float("inf") and batches % accumulated
    if every is None or ((across or every < batches) and (uneven or every % accumulated)):
        refuse(
            "trainer.val_check_interval",
            f"is {'a time' if every is None else f'{every} batches'}, and accumulate_grad_batches is {accumulated}: "
            f"the checkpoint after a validation would lose gradients; take a multiple of {accumulated} batches.",
        )
    if any(saver._train_time_interval is not None for saver in _model_checkpoints(trainer)):
        refuse(
            "ModelCheckpoint",
            "train_time_interval may fall between accumulated batches, and the checkpoint would lose their gradients; "
            "take every_n_train_steps.",
        )


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _within_step(trainer: Trainer) -> bool:
    """Whether gradients of some batches are accumulated that no step has used yet."""
    return trainer.fit_loop._should_accumulate()


def _off(trainer: Trainer) -> bool:
    """Whether this is no training run, or one that saves nothing."""
    return bool(trainer.fast_dev_run) or trainer.state.fn != "fit" or trainer.sanity_checking  # type: ignore[attr-defined]
