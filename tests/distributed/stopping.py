"""Runs on two processes that are stopped and continued, or cannot save."""

import logging
import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import distributed as dist

from mtp_modules.core.checksums import damaged_file
from mtp_modules.loading import read_checkpoint
from mtp_modules.training import LastCheckpoint
from tests.distributed.runs import Run, data, fsdp2_strategy, module, trainer
from tests.faults.processes import give_up_capabilities
from tests.resuming import SaveAt, hash_of

CASES = {
    "ddp": Run(strategy="ddp", share_of_positions=0.5, distillation=0.0, optimizer="adamw"),
    "ddp with muon": Run(strategy="ddp", share_of_positions=0.5, accumulate=1, clip=None),
    "fsdp2": Run(share_of_positions=0.5),
}


def stop_and_go(folder: Path, name: str) -> dict[str, str]:
    """Return the hash of weights and optimizer state of a whole run, and of one that was stopped twice."""
    run = CASES[name]

    def fit(start: Path | None = None, save: Path | None = None, step: int = 0, shards: bool = False) -> str:
        made, rows = module(run, sharded=run.strategy == "fsdp2"), data(run, 2)
        torch.manual_seed((10 if start is None else 20) + dist.get_rank())
        more = {"strategy": fsdp2_strategy(2, shards=True)} if shards else {}
        stop = [] if save is None else [SaveAt(save, step)]
        trainer(run, 2, folder, callbacks=stop, max_steps=9, **more).fit(made, rows, ckpt_path=start)
        return hash_of(made)

    found = {"whole": fit()}
    for kind in ("file", "shards") if run.strategy == "fsdp2" else ("file",):
        for step, start in ((2, None), (5, 2)):
            path = None if start is None else folder / f"{name} {kind} {start}.ckpt"
            fit(path, folder / f"{name} {kind} {step}.ckpt", step, shards=kind == "shards")
        found[kind] = fit(folder / f"{name} {kind} 5.ckpt", shards=kind == "shards")
    return found


class _Lines(logging.Handler):
    """Collects what a run says of its resumption."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("Resumed "):
            self.lines.append(text)


def change(folder: Path) -> dict[str, Any]:
    """Continue sharded runs under other settings; return the learning rates of the next step, and what was said."""
    handler, found = _Lines(), {}
    logging.getLogger("lightning.pytorch").addHandler(handler)

    def fit(run: Run, steps: int, start: Path | None = None, save: Path | None = None, **changed: Any) -> Any:
        made = module(run, sharded=True)
        if changed:
            made.optimizer = partial(made.optimizer, **changed)
        fitted = trainer(run, 2, folder, max_steps=steps)
        fitted.fit(made, data(run, 2), ckpt_path=start)
        if save is not None:
            fitted.save_checkpoint(save)
        return fitted

    path, frozen = folder / "muon.ckpt", Run(freeze=("trunk",))
    fit(Run(), 2, save=path)
    fitted = fit(Run(), 5, start=path, lr=0.3, weight_decay=0.0)
    found["rates"] = [group["initial_lr"] for group in fitted.optimizers[0].param_groups]
    found["decay"] = [group["weight_decay"] for group in fitted.optimizers[0].param_groups]
    found["said"] = list(handler.lines)
    for name, run in (("class", Run(optimizer="adamw")), ("frozen", frozen)):
        try:
            fit(run, 5, start=path)
        except ValueError as error:
            found[name] = str(error)
    return found


class FullDisk(Callback):
    """Let one rank's writes fail from a step on, as those to a full disk do."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Set the limit."""
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))


def fail_to_save(folder: Path) -> dict[str, tuple[str, int]]:
    """Return what each run says that cannot save, and the step of the checkpoint that it leaves."""
    give_up_capabilities()
    found = {}
    for kind, rank in (("ddp", 0), ("fsdp2", 0), ("shards", 1), ("no permission", None)):
        run, place = CASES["ddp" if kind in ("ddp", "no permission") else "fsdp2"], folder / kind
        more = {"strategy": fsdp2_strategy(2, shards=True)} if kind == "shards" else {}
        callbacks: list[Any] = [LastCheckpoint(every_n_steps=2, dirpath=str(place))]
        if rank is None:
            place.mkdir(mode=0o555, exist_ok=True)
        else:
            callbacks.append(FullDisk(rank, step=3))
        fitted = trainer(run, 2, folder, callbacks=callbacks, enable_checkpointing=True, max_steps=9, **more)
        try:
            fitted.fit(module(run, sharded=run.strategy == "fsdp2"), data(run, 2))
        except ValueError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dist.barrier()
        left = sorted(file.name for file in place.iterdir())
        path, step = place / "last.ckpt", 0
        if path.is_dir():
            assert damaged_file(path) is None
            step = int(torch.load(path / "meta.pt", weights_only=True)["global_step"])
        elif path.exists():
            step = int(read_checkpoint(path)["global_step"])
        assert left == ([path.name] if step else [])
        found[kind] = said, step
    return found


class KillRank(Callback):
    """Kill the last rank in the middle of a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        """Do it."""
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train_from_last(folder: Path, world_size: int, workers: int, kill_at: int | None) -> str:
    """Train from the last checkpoint, if there is one, until killed; return the hash at the end of the run."""
    run, path = CASES["ddp"], folder / "last.ckpt"
    made, rows = module(run), data(run, world_size)
    rows.num_workers = workers
    start = path if path.exists() else None
    torch.manual_seed((10 if start is None else 20) + dist.get_rank())
    callbacks = [LastCheckpoint(every_n_steps=2, dirpath=str(folder)), KillRank(kill_at)]
    fitted = trainer(run, world_size, folder, callbacks=callbacks, enable_checkpointing=True, max_steps=9)
    fitted.fit(made, rows, ckpt_path=start)
    return hash_of(made)
