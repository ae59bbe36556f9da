"""Small float64 training runs that are the same on one process and on two."""

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from mtp_modules import GeometricWeights, MultiTokenLoss
from mtp_modules.data import ProgressionDataModule
from mtp_modules.metrics import PerHeadMetrics
from mtp_modules.objectives import AuxiliaryObjective, FutureBagOfWords, TokenOrder
from mtp_modules.training import GracefulStop, MTPModule, MuonWithAdamW, Sharding, WarmupDecay
from tests.helpers import EVERY_HEADS, TRUNKS, VOCAB, float64, make_model, random_tokens, randomise

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
    num_horizons: int = 3
    tied: bool = True
    own_unembeddings: bool = False
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
    objectives: bool = False
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


def objectives() -> list[AuxiliaryObjective]:
    """Return one objective of each kind."""
    width = TRUNKS["gru"]().d_model
    return [
        TokenOrder(d_model=width, vocab_size=VOCAB, window=3, weight=0.7),
        FutureBagOfWords(d_model=width, vocab_size=VOCAB, window=3, weighted=False),
    ]


def module(run: Run, *, sharded: bool = False) -> MTPModule:
    """Build the module of a run, the same at every call."""
    with float64():
        made = MTPModule(
            trunk=TRUNKS[run.trunk](),
            heads=EVERY_HEADS[run.heads](run.num_horizons),
            loss=MultiTokenLoss(
                weights=GeometricWeights(gamma=0.5),
                share_of_positions=run.share_of_positions,
                distillation=run.distillation,
            ),
            optimizer=OPTIMIZERS[run.optimizer],
            lr_schedule=WarmupDecay(warmup_steps=2),
            tie_embeddings=run.tied,
            own_unembeddings=run.own_unembeddings,
            output_bias=run.own_unembeddings,
            freeze=run.freeze,
            activation_checkpointing=run.activation_checkpointing,
            sharding=Sharding(reshard_after_forward=run.reshard_after_forward) if sharded else None,
            objectives=objectives() if run.objectives else (),
        )
    randomise(made.model)
    randomise(made.objectives)
    torch.manual_seed(0)
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
        lookahead=run.num_horizons,
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
        "fsdp2": lambda: fsdp2_strategy(world_size),
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


def fsdp2_strategy(world_size: int, *, shards: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=world_size,
        tensor_parallel_size=1,
        save_distributed_checkpoint=shards,
        process_group_backend="gloo",
    )


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


class Figures(Callback):
    """Keeps what the last step logged, without what is timed."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Copy it."""
        logged = trainer.callback_metrics.items()
        self.found = {name: float(value) for name, value in logged if "per_second" not in name}


def figures(run: Run, world_size: int, folder: Path, *, rows: int = ROWS) -> dict[str, float]:
    """Train, and return the figures of the last step."""
    seen, made = Figures(), data(run, world_size)
    made.batch_size = rows // world_size
    sharded = world_size > 1 and run.strategy == "fsdp2"
    fitted = trainer(run, world_size, folder, callbacks=[seen], log_every_n_steps=1)
    fitted.fit(module(run, sharded=sharded), made)
    return seen.found


def all_figures(runs: list[Run], folder: Path) -> list[dict[str, float]]:
    """Train several runs on two processes, and return the figures of the last step of each."""
    return [figures(run, 2, folder) for run in runs]


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


def resume(folder: Path) -> dict[str, Any]:
    """Go on from `one.ckpt` and from what sharded runs of two kinds save, and return the weights in the end."""
    run, found = Run(), {}

    def fit(*, steps: int, start: Path | None = None, save: Path | None = None, shards: bool = False) -> Any:
        made = module(run)
        kind = {"strategy": fsdp2_strategy(2, shards=shards), "max_steps": steps}
        fitted = trainer(run, 2, folder, **kind)
        fitted.fit(made, data(run, 2), ckpt_path=start)
        if save is not None:
            fitted.save_checkpoint(save)
        return weights(made)

    found["one process"] = fit(steps=5, start=folder / "one.ckpt")
    fit(steps=3, save=folder / "file.ckpt")
    found["one file"] = fit(steps=5, start=folder / "file.ckpt")
    fit(steps=3, save=folder / "shards.ckpt", shards=True)
    found["shards"] = fit(steps=5, start=folder / "shards.ckpt", shards=True)
    try:
        trainer(run, 2, folder).predict(module(run), data(run, 2), ckpt_path=folder / "larger.ckpt")
    except ValueError as error:
        found["refused"] = str(error)
    return found


def evaluate(strategy: str, folder: Path) -> tuple[Any, Any]:
    """Validate and predict with the weights that a run starts from."""
    run = Run(strategy=strategy)
    made, rows = module(run), data(run, 2)
    evaluator = trainer(run, 2, folder, limit_val_batches=1.0)
    return evaluator.validate(made, rows, verbose=False), evaluator.predict(made, rows)


class SignalOneRank(Callback):
    """Send the second process a signal in the middle of the second step."""

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        """Send it."""
        if trainer.global_rank == 1 and trainer.fit_loop.total_batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_one_rank(folder: Path) -> dict[str, tuple[int, int | None]]:
    """Return after how many steps each run stopped, and with which signal."""
    found = {}
    for strategy in ("ddp", "fsdp2"):
        run, stop = Run(strategy=strategy, steps=9), GracefulStop(f"{strategy}.ckpt")
        stopped = trainer(run, 2, folder, callbacks=[stop, SignalOneRank()])
        stopped.fit(module(run), data(run, 2))
        found[strategy] = (stopped.global_step, stop.received)
    return found


def metric_of(rows: Any) -> dict[str, float]:
    """Return the figures of some rows, counted batch by batch."""
    model, metric = make_model(num_horizons=3), PerHeadMetrics(num_horizons=3)
    for row in rows:
        metric.update(MultiTokenLoss()(model, random_tokens(1 + row % 3, 7, seed=row)))
    return {name: float(value) for name, value in metric.compute().items()}


def count_rows() -> dict[str, float]:
    """Return the figures of all rows, of which each rank counts its own, unequally many."""
    return metric_of(range(5) if dist.get_rank() == 0 else range(5, 12))
