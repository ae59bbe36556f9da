"""Runs on two processes that are stopped and continued."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.distributed.runs import Run, data, fsdp2_strategy, module, trainer
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
