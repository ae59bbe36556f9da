"""Charts of TensorBoard: one for every figure, with a line for every head."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

_OF_HEADS = ("loss", "perplexity", "accuracy", "top5_accuracy")
_OF_TRAINING = {
    "loss that is minimised": r"^train/loss$",
    "learning rate": r"^train/lr$",
    "gradient norms": r"^train/grad_norm/.*$",
    "gradients of the other horizons": r"^train/grad_(cosine|ratio)$",
    "tokens and samples per second": r"^train/(tokens|samples)_per_second$",
    "tflops per second, and MFU": r"^train/(tflops_per_second|mfu)$",
}


def chart_layout() -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Return the charts of TensorBoard's page "Custom scalars", by stage and title, each with patterns of its keys."""
    layout: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for stage in ("train", "val", "test"):
        patterns = {f"{name.replace('_', ' ')} of every head": rf"^{stage}/{name}/head_\d+$" for name in _OF_HEADS}
        patterns["accepted length"] = rf"^{stage}/accepted_length$"
        patterns |= _OF_TRAINING if stage == "train" else {}
        layout[stage] = {title: ("Multiline", [pattern]) for title, pattern in patterns.items()}
    layout["run"] = {"epoch": ("Multiline", ["^epoch$"])}
    return layout


class GroupedCharts(Callback):
    """Tell TensorBoard how the figures of a run are grouped, so that heads are lines of one chart, not charts."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout beside the figures."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(chart_layout())
