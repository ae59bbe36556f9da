"""Sharded models whose drafts are few tokens go on from a checkpoint."""

from pathlib import Path

from torch import Tensor

from mtp_modules import MultiTokenLoss
from mtp_modules.training import MTPModule, choose_draft_tokens
from tests.distributed.runs import Run, data, fsdp2_strategy, trainer, weights
from tests.helpers import HEADS, TRUNKS, float64, randomise


def module() -> MTPModule:
    """Build a module whose draft tokens are not chosen, the same at every call."""
    with float64():
        trunk, heads = TRUNKS["gru"](), HEADS["recurrent"](3)
        for part in (trunk, heads):
            randomise(part)
        return MTPModule(trunk=trunk, heads=heads, loss=MultiTokenLoss(), num_draft_tokens=4)


def resume(folder: Path) -> dict[str, tuple[list[int], dict[str, Tensor]]]:
    """Return the draft tokens and the weights of a whole run, and of those that go on from one file and from shards."""
    found = {}
    for name, steps, start in (
        ("whole", 4, None),
        ("file", 2, None),
        ("shards", 2, None),
        ("file", 4, "file"),
        ("shards", 4, "shards"),
    ):
        run, made = Run(steps=steps), module()
        if start is None:
            choose_draft_tokens(made.model, data(run, 2))
        fitted = trainer(run, 2, folder, strategy=fsdp2_strategy(2, shards=name == "shards"))
        fitted.fit(made, data(run, 2), ckpt_path=None if start is None else folder / start)
        if steps == 2:
            fitted.save_checkpoint(folder / name)
        tokens = made.model.unembedding.draft_tokens
        assert tokens is not None
        found[name] = (tokens.tolist(), weights(made))
    return found
