"""Training from hidden states that one process writes for all."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from mtp_modules import MultiTokenLoss
from mtp_modules.data import CachedStates, TextDataModule
from mtp_modules.training import MTPModule
from tests.distributed.runs import ROWS, Run, trainer, weights
from tests.helpers import HEADS, TRUNKS, float64, randomise


class Reads(Callback):
    """Counts how many rows the trunk reads before training, and in it."""

    def __init__(self) -> None:
        self.rows = {"before": 0, "in training": 0}
        self.now = "before"

    def setup(self, trainer: Trainer, pl_module: MTPModule, stage: str) -> None:
        """Listen to the trunk."""
        pl_module.trunk.register_forward_pre_hook(self._read)

    def _read(self, trunk: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows[self.now] += len(inputs[0])

    def on_train_start(self, *_: Any) -> None:
        """Training begins."""
        self.now = "in training"


def train(corpus: Path, folder: Path, world_size: int) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return how many rows the trunk read, and the weights in the end."""
    run = Run(strategy="ddp", trunk="gru", heads="recurrent", freeze=("trunk",), accumulate=2)
    with float64():
        trunk, heads = TRUNKS["gru"](), HEADS["recurrent"](3)
        for part in (trunk, heads):
            randomise(part)
        made = MTPModule(trunk=trunk, heads=heads, loss=MultiTokenLoss(), freeze=run.freeze)
    data = TextDataModule(
        sources=[str(corpus)],
        window=8,
        lookahead=3,
        batch_size=ROWS // world_size,
        val_share=0.0,
        test_share=0.0,
        random_offsets=False,
        cached_states=CachedStates(folder=str(folder / "states"), dtype="float32", max_windows=40),
    )
    reads = Reads()
    trainer(run, world_size, folder, callbacks=[reads]).fit(made, data)
    return reads.rows, weights(made)
