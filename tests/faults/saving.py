"""What processes that are killed do meanwhile: save one checkpoint after another."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as sharded

from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk
from mtp_modules.core.saving import finish_folder, remove_partial, save_checkpoint

SIZE = 200_000


def elsewhere(path: Path) -> Path:
    """Return a folder on another file system, for ``$TMPDIR``; the same for the same path."""
    return Path("/dev/shm") / hashlib.sha256(str(path).encode()).hexdigest()[:16]


def content(step: int) -> dict[str, Any]:
    """A checkpoint whose parts all say which one it is."""
    return {"step": step, "first": torch.full((SIZE,), float(step)), "second": torch.full((SIZE,), float(step))}


def save_files(path: Path) -> None:
    """Save one after another, until killed."""
    os.environ["TMPDIR"] = str(elsewhere(path))
    for step in range(10**9):
        save_checkpoint(content(step), path)


def save_folders(path: Path) -> None:
    """The same, as shards."""
    os.environ["TMPDIR"] = str(elsewhere(path))
    for step in range(10**9):
        partial = path.with_name(f".{path.name}.shards.partial")
        remove_partial(path.parent)
        whole = content(step)
        sharded.save({"first": whole["first"], "second": whole["second"]}, checkpoint_id=partial, no_dist=True)
        finish_folder(partial, path)


def save_models(folder: Path) -> None:
    """Save two models of equal shapes in turn, each with its number of positions for weights."""
    models = []
    for positions in (256, 512):
        trunk = RecurrentTrunk(vocab_size=300, d_model=64, num_layers=2, max_positions=positions)
        model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=64, num_horizons=2))
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, positions)
        models.append(model)
    for step in range(10**9):
        models[step % 2].save_pretrained(folder)
