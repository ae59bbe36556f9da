"""Small float64 training runs that are the same on one process and on two."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from mtp_modules import GeometricWeights, MultiTokenLoss
from mtp_modules.core.component import build, describe
from mtp_modules.data import ProgressionDataModule
from mtp_modules.training import MTPModule, MuonWithAdamW, Sharding, WarmupDecay
from tests.helpers import VOCAB, float64, make_model

ROWS = 8
"""Rows of a micro-batch over all processes."""


@dataclass(frozen=True)
class Run:
    """One way to train; the defaults are the case that most can go wrong with.

    With ``unequal_counts``, ranks get unequal numbers of valid targets.
    """

    strategy: str = "fsdp2"
    trunk: str = "transformer_grouped"
    heads: str = "parallel"
    tied: bool = True
    optimizer: str = "muon"
    accumulate: int = 2
    clip: float | None = 0.05
    clip_algorithm: str = "norm"
    share_of_positions: float = 1.0
    distillation: float = 0.5
    activation_checkpointing: str | None = None
    reshard_after_forward: bool = True
    freeze: tuple[str, ...] = ()
    unequal_counts: bool = False
    steps: int = 3

    @property
    def name(self) -> str:
        """What is not the default."""
        differs = (f"{key}={value}" for key, value in vars(self).items() if value != getattr(Run, key))
        return ",".join(differs) or "default"


OPTIMIZERS = {
    "muon": partial(MuonWithAdamW, lr=0.02, adamw_lr=0.01, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.02),
}


def module(run: Run, *, sharded: bool = False) -> MTPModule:
    """Build the module of a run, the same at every call."""
    model = make_model(run.trunk, run.heads, tied=run.tied)
    description = describe(model)["init_args"]
    torch.manual_seed(0)
    with float64():
        made = MTPModule(
            trunk=build(description["trunk"]),
            heads=build(description["heads"]),
            loss=MultiTokenLoss(
                weights=GeometricWeights(gamma=0.5),
                share_of_positions=run.share_of_positions,
                distillation=run.distillation,
            ),
            optimizer=OPTIMIZERS[run.optimizer],
            lr_schedule=WarmupDecay(warmup_steps=2),
            tie_embeddings=run.tied,
            freeze=run.freeze,
            activation_checkpointing=run.activation_checkpointing,
            sharding=Sharding(reshard_after_forward=run.reshard_after_forward) if sharded else None,
        )
    made.model.load_state_dict(model.state_dict())
    return made


class Masked(ProgressionDataModule):
    """Progressions of which some rows have few tokens that count."""

    def rows(self, split: str) -> Any:
        """Give every row a mask that follows from its number."""
        rows = super().rows(split)
        plain = type(rows).batch

        def batch(ids: Any) -> dict[str, Tensor]:
            tokens = plain(rows, ids)["tokens"]
            starts = torch.from_numpy(ids % 5)[:, None]
            return {"tokens": tokens, "loss_mask": torch.arange(tokens.shape[1]) >= starts}

        rows.batch = batch
        return rows


def data(run: Run, world_size: int) -> ProgressionDataModule:
    """Return data of which every process gets its part of ``ROWS`` rows."""
    kind = Masked if run.unequal_counts else ProgressionDataModule
    return kind(
        batch_size=ROWS // world_size,
        lookahead=3,
        vocab_size=VOCAB,
        length=4,
        steps=[1],
        num_train=64,
        num_val=16,
        num_test=16,
    )


def trainer(run: Run, world_size: int, folder: Path, **more: Any) -> Trainer:
    """Return a quiet trainer on one process, or as one of two."""
    strategies = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
        ),
    }
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": "auto" if world_size == 1 else strategies[run.strategy](),
        "max_steps": run.steps,
        "accumulate_grad_batches": run.accumulate,
        "gradient_clip_val": run.clip,
        "gradient_clip_algorithm": run.clip_algorithm,
        "default_root_dir": folder,
        "inference_mode": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(**(options | more))


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return all parameters, gathered."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in module.named_parameters()
    }


def train(run: Run, world_size: int, folder: Path) -> dict[str, Tensor]:
    """Train, and return the weights."""
    sharded = world_size > 1 and run.strategy == "fsdp2"
    made = module(run, sharded=sharded)
    trainer(run, world_size, folder).fit(made, data(run, world_size))
    assert all(isinstance(value, DTensor) for value in made.parameters()) == sharded
    return weights(made)


def train_all(runs: list[Run], folder: Path) -> list[dict[str, Tensor]]:
    """Train several runs on two processes, one after another."""
    return [train(run, 2, folder) for run in runs]


def rank_and_sum(value: int) -> tuple[int, int]:
    """Return the rank, and the sum of value and rank over all ranks."""
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_rank_one() -> None:
    """Raise on one rank while the other waits for it."""
    if dist.get_rank() == 1:
        raise ValueError("broken on purpose")
    dist.barrier()


def wait_for_ever() -> None:
    """Never return."""
    time.sleep(1000)
