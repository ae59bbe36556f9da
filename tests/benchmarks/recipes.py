"""Heads, horizons and weights at equal CPU time: what each costs the next byte, and how good its drafts are.

Every row trains on the standard library's bytes for the same CPU seconds of one thread, its learning rate falling to 0
with them. "accepted" is the mean length of the run of horizons that agree with horizon 1 on held-out text.

    python tests/benchmarks/recipes.py --seconds 60
"""

import argparse
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from mtp_modules import (
    AuxiliaryWeights,
    Heads,
    LinearHeads,
    MTPModel,
    MultiTokenLoss,
    ParallelHeads,
    PerHeadMetrics,
    RecurrentHeads,
    TransformerTrunk,
)
from mtp_modules.data import TextDataModule
from mtp_modules.training import MuonWithAdamW, WarmupDecay, muon_parameter_groups

WINDOW, BATCH = 256, 4


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    name: str
    heads: str = "recurrent"
    horizons: int = 8
    weight: float = 0.3
    share: float = 0.25
    distillation: float = 0.5
    previous: int = 3
    layers: int = 4
    d_model: int = 128


RECIPES = [
    Recipe("no extra heads", horizons=1),
    Recipe("recurrent"),
    Recipe("recurrent, light", weight=0.1),
    Recipe("recurrent, light, no distillation", weight=0.1, distillation=0.0),
    Recipe("recurrent, equal weights", weight=1.0, share=1.0, distillation=0.0),
    Recipe("recurrent, 4 horizons", horizons=4),
    Recipe("linear", heads="linear"),
    Recipe("linear, equal weights", heads="linear", horizons=4, weight=1.0, share=1.0, distillation=0.0),
    Recipe("parallel, equal weights", heads="parallel", horizons=4, weight=1.0, share=1.0, distillation=0.0, layers=3),
    Recipe("recurrent, no previous bytes", previous=0),
]


def build(recipe: Recipe) -> tuple[MTPModel, MultiTokenLoss]:
    """Make the model and the loss of a row."""
    torch.manual_seed(0)
    width, horizons = recipe.d_model, recipe.horizons
    heads: Heads
    if recipe.heads == "linear":
        heads = LinearHeads(d_model=width, num_horizons=horizons)
    elif recipe.heads == "parallel":
        heads = ParallelHeads(d_model=width, num_horizons=horizons, num_heads=2, num_kv_heads=1)
    else:
        heads = RecurrentHeads(d_model=width, num_horizons=horizons)
    trunk = TransformerTrunk(
        vocab_size=256,
        d_model=width,
        num_layers=recipe.layers,
        num_heads=2,
        num_kv_heads=1,
        num_previous=recipe.previous,
        embedding_std=1.0,
    )
    loss = MultiTokenLoss(
        weights=AuxiliaryWeights(weight=recipe.weight),
        share_of_positions=recipe.share,
        distillation=recipe.distillation,
    )
    return MTPModel(trunk=trunk, heads=heads, tie_embeddings=False), loss


def train(recipe: Recipe, seconds: float) -> tuple[MTPModel, MultiTokenLoss, int]:
    """Train for a number of CPU seconds and return what came out and the bytes it saw."""
    model, loss = build(recipe)
    data = text(model)
    data.setup("fit")
    optimizer = MuonWithAdamW(muon_parameter_groups(model), lr=0.01, adamw_lr=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule, seen, used = WarmupDecay(warmup_steps=50), 0, 0.0
    started = time.process_time()
    for batch in data.train_dataloader():
        used = time.process_time() - started
        if used >= seconds:
            break
        factor = schedule(round(1000 * used / seconds), 1000)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        optimizer.zero_grad()
        loss(model, **batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += BATCH * WINDOW
    return model, loss.eval(), seen


def text(model: MTPModel) -> TextDataModule:
    """Return the corpus."""
    return TextDataModule(
        sources=["stdlib"], window=WINDOW, lookahead=model.lookahead, batch_size=BATCH, max_eval_windows=512
    )


@torch.inference_mode()
def evaluate(model: MTPModel, loss: MultiTokenLoss) -> dict[str, torch.Tensor]:
    """Score held-out files."""
    metrics = PerHeadMetrics(num_horizons=len(model.horizons))
    data = text(model)
    data.setup("validate")
    for batch in data.val_dataloader():
        metrics.update(loss(model, **batch))
    figures: dict[str, torch.Tensor] = metrics.compute()
    return figures


def main() -> None:
    """Train every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", type=int, nargs="*", default=list(range(len(RECIPES))))
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"{options.seconds:.0f} CPU seconds a row, one thread, one seed")
    columns = ("heads", "n", "weight", "share", "distillation", "parameters", "MB seen", "next byte (nats)", "accepted")
    for column in columns:
        table.add_column(column, justify="right")
    for index in options.rows:
        recipe = RECIPES[index]
        model, loss, seen = train(recipe, options.seconds)
        figures = evaluate(model, loss)
        row = (
            recipe.name,
            str(recipe.horizons),
            f"{recipe.weight}",
            f"{recipe.share}",
            f"{recipe.distillation}",
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M",
            f"{seen / 1e6:.2f}",
            f"{float(figures['loss/head_1']):.3f}",
            f"{float(figures['accepted_length']):.2f}",
        )
        print(" | ".join(row), flush=True)
        table.add_row(*row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
