"""Train one run of a study in a worker process, with Lightning's trainer and the module of ``fit``."""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything

from mtp_modules.configuration import assemble
from mtp_modules.core.checks import refuse
from mtp_modules.studies.cells import Cell
from mtp_modules.studies.evaluation import Evaluation, decoded, evaluate, evaluating
from mtp_modules.studies.plan import Cost, Run
from mtp_modules.training import MTPModule, choose_draft_tokens, prepare_objectives, step_flops

ReportStep = Callable[[int], None]
"""Called with the number of finished steps."""

_CALIBRATION_STEPS, _CALIBRATION_SECONDS, _SKIPPED_STEPS = 40, 2.0, 2


class _Clock:
    """Wall-clock and CPU seconds; a GPU is synchronised first, and its wall-clock time stands for both."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter(), time.perf_counter()
        return time.perf_counter(), time.process_time()


class _StepTimes(Callback):
    """Measure the time of steps, and stop after enough of them."""

    def __init__(self) -> None:
        self.walls: list[float] = []
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.clock = _Clock(trainer.strategy.root_device)
        self.first = self.last = self.clock()
        self.steps = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return  # gradients of this batch are accumulated
        self.steps, now = trainer.global_step, self.clock()
        self.walls.append(now[0] - self.last[0])
        self.seconds.append(now[1] - self.last[1])
        self.last = now
        if now[0] - self.first[0] > _CALIBRATION_SECONDS and self.steps > _SKIPPED_STEPS:
            trainer.should_stop = True


class _Recorder(Callback):
    """Evaluate at given steps, and raise an error if the loss is not finite."""

    def __init__(self, run: Run, cost: Cost, report_step: ReportStep) -> None:
        self.run, self.cost, self.report_step = run, cost, report_step
        self.curve: list[dict[str, Any]] = []
        self.at = set(run.evaluated_at())
        self.evaluation: Evaluation | None = None
        self.evaluated = -1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.clock = _Clock(trainer.strategy.root_device)
        self.started, self.paused = self.clock(), (0.0, 0.0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        self.report_step(step)
        if step not in self.at or step == self.evaluated:
            return
        self.evaluated, before = step, self.clock()
        self.evaluation = evaluate(pl_module, _held_out(trainer.datamodule))  # type: ignore[attr-defined]
        figures = self.evaluation.figures
        if not all(math.isfinite(value) for value in figures.values()):
            refuse(self.run.label, f"the loss is not finite after {step} steps; use a lower learning rate.")
        seconds = [now - start - waited for now, start, waited in zip(before, self.started, self.paused, strict=True)]
        self.curve.append(
            {
                "steps": step,
                "examples": step * self.cost.examples,
                "tokens": step * self.cost.tokens,
                "flops": step * self.cost.flops + self.run.spent,
                "seconds": seconds[0],
                "computing": seconds[1],
                "figures": figures,
            }
        )
        after = self.clock()
        waits = zip(self.paused, after, before, strict=True)
        self.paused = tuple(waited + now - then for waited, now, then in waits)  # type: ignore[assignment]


def calibrate(
    cell: Cell, helpers: dict[str, str], save_to: str | None, *, device: int | None, report_step: ReportStep
) -> Cost:
    """Train a few steps of a cell, and return the cost of one step.

    Args:
        cell: Configuration to train.
        helpers: Paths of the helpers' checkpoints.
        save_to: Folder for the model, if other arms need it.
        device: Index of the GPU; the CPU if ``None``.
        report_step: Called with the number of finished steps.

    Raises:
        ValueError: If the configuration is invalid.
    """
    started = time.perf_counter()
    module, data = _assembled(cell, 1, helpers)
    module.finite_steps.limit = _CALIBRATION_STEPS  # how a run learns is not asked here
    times = _StepTimes()
    trainer = _trainer(cell, times, steps=_CALIBRATION_STEPS, device=device)
    choose_draft_tokens(module.model, data)
    prepare_objectives(module, data)
    trainer.fit(module, datamodule=data)
    module.to(trainer.strategy.root_device)
    setup = time.perf_counter() - started - sum(times.walls)
    begun = time.perf_counter()
    evaluation = evaluate(module, _held_out(data))
    evaluation_seconds = time.perf_counter() - begun
    if save_to is not None:
        module.model.save_pretrained(save_to)
    measured = slice(_SKIPPED_STEPS if len(times.walls) > _SKIPPED_STEPS else 0, None)
    batch = next(iter(data.train_dataloader()))
    accumulated = int(cell.sections["trainer"].get("accumulate_grad_batches", 1))
    rows, length = batch["tokens"].shape[0], batch["tokens"].shape[1] - module.lookahead
    return Cost(
        examples=rows * accumulated,
        tokens=rows * length * accumulated,
        flops=step_flops(module, batch_size=rows, length=length) * accumulated,
        seconds=statistics.median(times.seconds[measured]),
        wall=statistics.fmean(times.walls[measured]),
        setup=setup,
        evaluation=evaluation_seconds,
        parameters=sum(parameter.numel() for parameter in module.model.parameters()),
        keys=tuple(evaluation.figures),
    )


def train(
    run: Run, cost: Cost, helpers: dict[str, str], save_to: str | None, *, device: int | None, report_step: ReportStep
) -> dict[str, Any]:
    """Train and evaluate a run, and return the result as plain values.

    Args:
        run: Configuration and length of the run.
        cost: Cost of a step.
        helpers: Paths of the helpers' checkpoints.
        save_to: Folder for the model, if other arms need it.
        device: Index of the GPU; the CPU if ``None``.
        report_step: Called with the number of finished steps.

    Raises:
        ValueError: If the configuration is invalid, or the loss is not finite.
    """
    module, data = _assembled(run.cell, run.seed, helpers)
    recorder = _Recorder(run, cost, report_step)
    trainer = _trainer(run.cell, recorder, steps=run.steps, device=device)
    choose_draft_tokens(module.model, data)
    prepare_objectives(module, data)
    trainer.fit(module, datamodule=data)
    assert recorder.evaluation is not None
    module.to(trainer.strategy.root_device)
    last, tests = recorder.curve[-1], {}
    final = {**last["figures"], "parameters": float(cost.parameters)}
    final |= {name: float(last[name]) for name in ("steps", "examples", "tokens", "flops", "seconds", "computing")}
    final["tokens_per_second"] = last["tokens"] / max(last["computing"], 1e-9)
    for name, overrides in run.cell.tests.items():
        _, other = _assembled(run.cell.changed(overrides, f"test {name!r}"), run.seed, helpers)
        tests[name] = evaluate(module, _held_out(other)).figures
    if run.decode is not None:
        with evaluating(module):
            final |= decoded(module.model, _held_out(data), run.decode)
    if save_to is not None:
        module.model.save_pretrained(save_to)
    positions = recorder.evaluation.positions
    return {"curve": recorder.curve, "final": final, "tests": tests, "positions": positions}


def _assembled(cell: Cell, seed: int, helpers: dict[str, str]) -> tuple[MTPModule, LightningDataModule]:
    seed_everything(seed, verbose=False)
    sections = cell.seeded(seed, helpers)
    return assemble(sections["model"], sections["data"])


def _held_out(data: Any) -> Any:
    data.setup("validate")
    return data.val_dataloader()


def _trainer(cell: Cell, callback: Callback, *, steps: int, device: int | None) -> Trainer:
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        accelerator="cpu" if device is None else "gpu",
        devices=1 if device is None else [device],
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
        use_distributed_sampler=False,
        default_root_dir=Path.cwd(),
        **cell.sections["trainer"],
    )
