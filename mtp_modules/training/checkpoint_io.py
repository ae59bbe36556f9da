"""How a trainer reads and writes its checkpoints: atomically, with checksums, and without unpickling code."""

import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

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

    A ``CheckpointIO`` that was given to the trainer stays.

    Args:
        trainer: Before it runs.
        path: Of a checkpoint that was read already; ``None`` if none was.
        checkpoint: Its content.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO(path, checkpoint)
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy.save_checkpoint, _ShardSaving):
        strategy.save_checkpoint = _ShardSaving(strategy)  # type: ignore[method-assign]


class _ShardSaving:
    """``ModelParallelStrategy.save_checkpoint`` with shards in a folder beside the target, which then replaces it."""

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        self.strategy, self.write = strategy, strategy.save_checkpoint

    def __call__(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        strategy = self.strategy
        path = Path(strategy.broadcast(filepath))
        if not strategy._save_distributed_checkpoint or _is_remote(path):
            self.write(checkpoint, path, storage_options)
            return
        partial = path.with_name(f".{path.name}.shards.partial")
        if strategy.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        strategy.barrier("no shards of a killed run")
        self.write(checkpoint, partial, storage_options)
        strategy.barrier("shards are written")
        if strategy.is_global_zero:
            finish_folder(partial, path)
        strategy.barrier("shards are in place")


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
