"""What is checked, and prepared, before anything is built or read for a run."""

from typing import Any

from lightning.pytorch import Trainer

from mtp_modules.data.module import TokenDataModule
from mtp_modules.training.checkpoint_io import on_rank_zero, write_atomically
from mtp_modules.training.last_checkpoint import check_save_folders
from mtp_modules.training.parallel import check_sharding
from mtp_modules.training.strategies import check_accumulation, check_compilation, check_trainer


def set_up(module: Any, trainer: Trainer, stage: str) -> None:
    """Check the trainer, let it write atomically, and let the data count targets ahead.

    Args:
        module: An :class:`~mtp_modules.training.MTPModule`.
        trainer: Of the run.
        stage: Of Lightning's: ``"fit"`` and others.

    Raises:
        ValueError: If options do not go together.
    """
    check_trainer(trainer)
    check_compilation(trainer, module.activation_checkpointing, compiled=module.compile_blocks)
    write_atomically(trainer)
    check_sharding(module.sharding, module.device_mesh)
    if stage == "fit":
        check_accumulation(trainer)
        on_rank_zero(trainer.strategy, check_save_folders, trainer, module)
        if isinstance(data := getattr(trainer, "datamodule", None), TokenDataModule):
            data.count_ahead(module.horizons, module.objectives.counter)
