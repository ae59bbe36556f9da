"""What a run does when it receives a signal."""

import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from mtp_modules.training.last_checkpoint import LAST, LastCheckpoint


class GracefulStop(Callback):
    """Turn Ctrl-C and SIGTERM into a stop after the current step, with a checkpoint.

    In training, the handler only sets a flag; ranks agree on it between two optimizer steps, so that none waits for
    another. Before and after, and at a second signal, the process ends at once with status 128 plus the signal's
    number, but a save that is under way is finished first. Under SLURM with automatic requeueing, its signal (SIGUSR1
    unless configured otherwise) also requeues the job. ``received`` is the signal that stopped the run, on all ranks;
    ``saved`` the path of the checkpoint.

    Args:
        filename: Name of the checkpoint in the root folder of the run, where it has no :class:`LastCheckpoint`.
    """

    def __init__(self, filename: str = LAST) -> None:
        self.filename = filename
        self.received: int | None = None
        self.saved: str | None = None
        self._training = self._saving = False
        self.trainer: Trainer | None = None
        self._previous: dict[int, Any] = {}
        self._keep = False

    def listen(self, *numbers: int, keep: bool = False) -> None:
        """Handle these signals from now on.

        Args:
            numbers: Of the signals; SIGINT and SIGTERM if none are given.
            keep: Do not give them back when training ends; call :meth:`restore`.
        """
        self._keep = self._keep or keep
        for number in numbers or (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._on_signal)
            if previous != self._on_signal:
                self._previous.setdefault(number, previous)

    def restore(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if self._saving or (self._training and not again):
            return
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if (kill := getattr(launcher, "kill", None)) is not None:  # processes that this one has started
            kill(number)
        raise SystemExit(128 + number)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer, whose other processes get the signal, too."""
        self.trainer = trainer

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handler, in which ranks can wait for each other."""
        self.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at the next optimizer boundary from now on."""
        self._training = True
        self.listen()
        if (environment := _requeueing(trainer)) is not None:
            self.listen(environment.requeue_signal or signal.SIGUSR1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at an optimizer boundary if any rank received a signal."""
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.world_size > 1:
            # All ranks share the signal of any, so that all save the checkpoint and exit with the same status.
            number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            self.received = int(trainer.strategy.reduce(number, reduce_op="max")) or None
        if self.received is not None and not trainer.should_stop:
            trainer.should_stop = True
            trainer.limit_val_batches = 0
            self.saved = str(self._save(trainer))
            rank_zero_info(f"\nStopped after step {trainer.global_step}; the checkpoint is {self.saved}")
            _requeue(trainer, self.received)

    def _save(self, trainer: Trainer) -> Path:
        self._saving = True
        try:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint):
                    return callback.save(trainer)
            folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
            path = Path(folder) / self.filename
            trainer.save_checkpoint(path)
            return path
        finally:
            self._saving = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a second signal wait for the end of a scheduled save, too."""
        self._saving = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End what :meth:`on_save_checkpoint` began."""
        self._saving = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous signal handlers."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the trainer."""
        self._end()
        self.trainer = None

    def _end(self) -> None:
        self._training = self._saving = False
        if not self._keep:
            self.restore()


def _requeueing(trainer: Trainer) -> SLURMEnvironment | None:
    """Return the environment of a SLURM job that is requeued when its time is over."""
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def slurm_job() -> str | None:
    """Return the id of the SLURM job that this process belongs to, the same after it was requeued; else ``None``."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return os.environ.get("SLURM_JOB_ID")


def _requeue(trainer: Trainer, received: int) -> None:
    environment, job = _requeueing(trainer), slurm_job()
    if environment is None or job is None or received != (environment.requeue_signal or signal.SIGUSR1):
        return
    if trainer.is_global_zero:
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            rank_zero_info(f"SLURM job {job} could not be requeued ({error}); submit it again: it goes on from {LAST}.")
        else:
            rank_zero_info(f"SLURM job {job} is requeued.")
