"""A tiny run of the real trainer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from mtp_modules import GeometricWeights, LinearHeads, MultiTokenLoss, RecurrentHeads, RecurrentTrunk, ResidualHeads
from mtp_modules.core import Heads
from mtp_modules.data import ProgressionDataModule
from mtp_modules.training import MTPModule, WarmupDecay

VOCAB = 24
HEADS: dict[str, Callable[[], Heads]] = {
    "linear": lambda: LinearHeads(d_model=16, num_horizons=3),
    "recurrent": lambda: RecurrentHeads(d_model=16, num_horizons=3),
    "residual": lambda: ResidualHeads(d_model=16, num_horizons=3),
}


def module(
    heads: str = "linear", *, share_of_positions: float = 1.0, vocab_size: int = VOCAB, tie_embeddings: bool = True
) -> MTPModule:
    torch.manual_seed(0)
    return MTPModule(
        trunk=RecurrentTrunk(vocab_size=vocab_size, d_model=16),
        heads=HEADS[heads](),
        loss=MultiTokenLoss(weights=GeometricWeights(gamma=0.5), share_of_positions=share_of_positions),
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        lr_schedule=WarmupDecay(warmup_steps=3),
        tie_embeddings=tie_embeddings,
    )


def data(**kwargs: Any) -> ProgressionDataModule:
    sizes = {"batch_size": 8, "lookahead": 3, "vocab_size": VOCAB, "length": 6}
    return ProgressionDataModule(**(sizes | {"num_train": 48, "num_val": 16, "num_test": 16} | kwargs))


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": list(callbacks),
    }
    return Trainer(**defaults | kwargs)


class SaveAt(Callback):
    """Save after an optimizer step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
