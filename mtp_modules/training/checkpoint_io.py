"""How a trainer reads and writes its checkpoints: atomically, with checksums, and without unpickling code."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.api import CheckpointException

from mtp_modules.core.checks import InputError, refuse
from mtp_modules.core.saving import finish_folder, save_checkpoint
from mtp_modules.loading import read_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Write a checkpoint beside its target, read it back, and rename it; check every tensor's checksum on reading.

    Lightning's own writes to ``$TMPDIR`` first: where that is another file system, a process that is killed leaves half
    a file under the final name, and it drops a checkpoint for which it has no permission without an error.

    Args:
        path: Of a checkpoint that was read already; ``None`` if none was.
        checkpoint: Its content, which the first load of ``path`` gets; released then.
    """

    def __init__(self, path: Path | None = None, checkpoint: dict[str, Any] | None = None) -> None:
        self.path, self._checkpoint = path, checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            ValueError: If it cannot be written, or does not read back as it was written.
        """
        if _is_remote(path):
            TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the checkpoint in memory on the first call for its path; read the file otherwise.

        Raises:
            ValueError: If it is damaged, or was not written by this package.
        """
        if self._checkpoint is not None and self.path == Path(path):
            found, self._checkpoint = self._checkpoint, None
            return found
        if _is_remote(path):
            return TorchCheckpointIO().load_checkpoint(path, weights_only=True)
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        TorchCheckpointIO().remove_checkpoint(path)


def write_atomically(trainer: Trainer, path: Path | None = None, checkpoint: dict[str, Any] | None = None) -> None:
    """Let a trainer save its checkpoints through :class:`AtomicCheckpointIO`, and shards to a folder beside the target.

    A save that fails on rank 0, which writes the files, fails on all ranks: none goes on to wait for the others. A
    ``CheckpointIO`` that was given to the trainer stays.

    Args:
        trainer: Before it runs.
        path: Of a checkpoint that was read already; ``None`` if none was.
        checkpoint: Its content.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO(path, checkpoint)
    shared = trainer.world_size > 1 or isinstance(strategy, ModelParallelStrategy)
    if shared and not isinstance(strategy.save_checkpoint, _SharedSaving):
        strategy.save_checkpoint = _SharedSaving(strategy)  # type: ignore[method-assign]


def on_rank_zero(strategy: Strategy, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function on rank 0; if it refuses its input there, raise the same error on all ranks.

    Args:
        strategy: Of the run.
        function: What it returns is dropped.
        arguments: Of the function.

    Raises:
        InputError: What the function raises on rank 0.
    """
    refused = None
    if strategy.is_global_zero:
        try:
            function(*arguments)
        except InputError as error:
            refused = str(error)
    _raise_everywhere(strategy, refused)


def _raise_everywhere(strategy: Strategy, refused: str | None) -> None:
    """Raise on all ranks what rank 0 refuses."""
    if (refused := strategy.broadcast(refused)) is not None:
        raise InputError(refused)


class _SharedSaving:
    """``Strategy.save_checkpoint`` of several processes; shards go to a folder beside the target, then replace it."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.write = strategy, strategy.save_checkpoint

    def __call__(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        strategy = self.strategy
        path = Path(strategy.broadcast(filepath)) if not _is_remote(filepath) else filepath
        if getattr(strategy, "_save_distributed_checkpoint", False) and not _is_remote(path):
            self._write_shards(checkpoint, path)
            return
        refused = None
        try:
            self.write(checkpoint, path, storage_options)
        except InputError as error:
            refused = str(error)
        _raise_everywhere(strategy, refused)

    def _write_shards(self, checkpoint: dict[str, Any], path: Path) -> None:
        strategy, partial = self.strategy, path.with_name(f".{path.name}.shards.partial")
        on_rank_zero(strategy, _remove, partial)
        try:
            self.write(checkpoint, partial)
        except CheckpointException as error:  # the same on all ranks
            on_rank_zero(strategy, _remove, partial)
            refuse(
                "saving",
                f"{path} could not be written ({_first(error)}); what was there is unchanged. Free some space, or name "
                "a folder that all processes can write to.",
            )
        on_rank_zero(strategy, finish_folder, partial, path)


def _first(error: CheckpointException) -> str:
    """Return what the first process that failed said."""
    failures = error.failures
    return str(failures[min(failures)][0])


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
