"""Progress bar, result table and prediction file of a run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from mtp_modules.core.saving import atomic_file
from mtp_modules.core.shapes import Tensor


class HeadsProgressBar(TQDMProgressBar):
    """A progress bar with the loss, the accuracy of every head in percent, and tokens per second.

    Args:
        refresh_rate: Batches between two redraws.
    """

    def __init__(self, refresh_rate: int = 5) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @property
    def total_train_batches(self) -> int | float:
        """How many batches this epoch will really run, where ``max_steps`` ends it early."""
        trainer = self.trainer
        total = trainer.num_training_batches
        if trainer.max_steps < 0:
            return total
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        done = (trainer.fit_loop.batch_idx + 1) % max(total, 1)  # between epochs, it is the index of the last one
        return min(total, done + left)

    def on_train_start(self, *args: Any) -> None:
        """Set the length at once: a run that resumes inside an epoch skips the hook that would."""
        super().on_train_start(*args)
        self.train_progress_bar.total = self.total_train_batches

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics to show in the bar."""
        known = trainer.callback_metrics
        shown: dict[str, int | str | float | dict[str, float]] = {}
        if "train/loss" in known:
            shown["loss"] = f"{float(known['train/loss']):.3f}"
            accuracy = by_head(known, "train/accuracy")
            shown["acc%"] = "/".join(f"{100 * value:.0f}" for value in accuracy)
        if "train/tokens_per_second" in known:
            shown["tok/s"] = f"{float(known['train/tokens_per_second']):.0f}"
        if "val/loss/head_1" in known:
            shown["val"] = f"{float(known['val/loss/head_1']):.3f}"
        return shown


def by_head(metrics: dict[str, Tensor], name: str) -> list[float]:
    """Return one metric for all heads, nearest horizon first.

    Args:
        metrics: Logged metrics under their keys.
        name: Key without its last part, such as ``"val/loss"``.
    """
    pattern = re.compile(re.escape(name) + r"/head_(\d+)$")
    found = [(int(match[1]), float(value)) for key, value in metrics.items() if (match := pattern.match(key))]
    return [value for _, value in sorted(found)]


class HeadsTable(Callback):
    """Print a table after ``test`` and ``validate``: loss and accuracies per head, and the mean accepted length."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the test metrics."""
        self._print(trainer, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of ``validate``; within ``fit``, the progress bar shows them."""
        if trainer.state.fn == "validate":
            self._print(trainer, "val")

    def _print(self, trainer: Trainer, stage: str) -> None:
        if trainer.is_global_zero:
            best = getattr(getattr(trainer, "datamodule", None), "ceiling", None)
            heads = len(by_head(trainer.callback_metrics, f"{stage}/loss"))
            ceiling = best(range(1, heads + 1)).accuracy if best else None
            Console().print(heads_table(trainer.callback_metrics, stage, ceiling))


def heads_table(metrics: dict[str, Tensor], stage: str, ceiling: Sequence[float] | None = None) -> Table:
    """Return a table with the metrics of every head.

    Args:
        metrics: Logged metrics under their keys.
        stage: ``"val"`` or ``"test"``.
        ceiling: The best possible top-1 accuracy on this data per horizon, if known.
    """
    length = float(metrics.get(f"{stage}/accepted_length", torch.tensor(float("nan"))))
    losses = by_head(metrics, f"{stage}/loss")
    table = Table(
        title=f"{stage}: every head",
        caption=f"mean accepted length {length:.2f} of {len(losses)}: tokens per verification step on this text",
    )
    columns = ["horizon", "loss (nats)", "top-1 accuracy", "top-5 accuracy"]
    for column in columns if ceiling is None else [*columns, "best possible top-1"]:
        table.add_column(column, justify="right")
    rows = zip(losses, by_head(metrics, f"{stage}/accuracy"), by_head(metrics, f"{stage}/top5_accuracy"), strict=True)
    for index, (loss, first, fifth) in enumerate(rows):
        best = [] if ceiling is None else [f"{ceiling[index]:.1%}"]
        table.add_row(str(index + 1), f"{loss:.4f}", f"{first:.1%}", f"{fifth:.1%}", *best)
    return table


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict`` returns to ``predictions.safetensors``: tokens and the most likely token of every horizon.

    Args:
        filename: Name of the file in the root folder of the run.
    """

    def __init__(self, filename: str = "predictions.safetensors") -> None:
        super().__init__(write_interval="epoch")
        self.filename = filename

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write all batches as one tensor per name; every rank writes its own file."""
        suffix = "" if trainer.world_size == 1 else f".rank{trainer.global_rank}"
        path = Path(trainer.log_dir or trainer.default_root_dir) / f"{self.filename}{suffix}"
        names = predictions[0].keys()
        with atomic_file(path) as partial:
            save_file({name: torch.cat([batch[name] for batch in predictions]) for name in names}, partial)
        rank_zero_info(f"Predictions written to {path}")
