"""What a run begins with: the parts of its model, and how many of their weights are trained."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.table import Table

from mtp_modules.model import MTPModel


class PartsSummary(ModelSummary):
    """Print a table of trunk, heads and unembedding, in the place of Lightning's, which shows one row and no FLOPs."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on the first rank."""
        if trainer.is_global_zero and isinstance(model := getattr(pl_module, "model", None), MTPModel):
            Console().print(parts_table(model))


def parts_table(model: MTPModel) -> Table:
    """Return a table with the weights of every part; a matrix that parts share counts in the first.

    Args:
        model: Trunk, heads and unembedding.
    """
    table = Table()
    for column in ("part", "class", "weights", "trained"):
        table.add_column(column, justify="right" if column in ("weights", "trained") else "left")
    seen: set[int] = set()
    totals = [0, 0]
    for name in ("trunk", "heads", "unembedding"):
        part = getattr(model, name)
        own = [parameter for parameter in part.parameters() if id(parameter) not in seen]
        seen.update(map(id, own))
        counts = [sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        table.add_row(name, type(part).__name__, *(f"{count:,}" for count in counts))
    table.add_section()
    table.add_row("all", "", *(f"{total:,}" for total in totals))
    return table
