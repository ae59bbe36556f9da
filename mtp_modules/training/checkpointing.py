"""Find a checkpoint and build the model that it describes."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import build
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.model import MTPModel

CHECKPOINT_KEY = "mtp_modules"
"""Where a training checkpoint keeps the description of its model and tokenizer."""

_PREFERRED = ("best.ckpt", "last.ckpt")


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a path means: itself, or the best of a run's folder, else the last, else the newest.

    Args:
        path: A file, a run's folder, or a folder that ``save_pretrained`` wrote (returned as it is).

    Raises:
        ValueError: If there is nothing there, or no checkpoint in it.
    """
    path = Path(path)
    if not path.exists():
        refuse("ckpt_path", f"{path} does not exist; give a checkpoint file, or the folder of a run.")
    if path.is_file() or (path / "model.safetensors").is_file():
        return path
    found = [file for folder in (path, path / "checkpoints") for file in folder.glob("*.ckpt")]
    if not found:
        refuse("ckpt_path", f"{path} holds no checkpoint; give a checkpoint file, or the folder of a run.")
    for name in _PREFERRED:
        for file in found:
            if file.name == name:
                return file
    return max(found, key=lambda file: file.stat().st_mtime)


def load_model(path: str | Path, *, trusted: tuple[str, ...] = ("mtp_modules",)) -> tuple[MTPModel, Tokenizer | None]:
    """Build the model, and the tokenizer if one is known, from a checkpoint alone.

    Args:
        path: Whatever :func:`find_checkpoint` understands. Nothing in it is unpickled but tensors and plain values.
        trusted: Top-level packages whose classes may be built.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If the file is no checkpoint of this package, or its weights do not fit.
    """
    path = find_checkpoint(path)
    if path.is_dir():
        return MTPModel.from_pretrained(path, trusted=trusted)
    checkpoint = _read(path)
    description = checkpoint[CHECKPOINT_KEY]
    model: MTPModel = build(description["model"], trusted=trusted)
    prefix = "model."
    state = {name[len(prefix) :]: value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        refuse("ckpt_path", f"the weights in {path} do not fit the model that it describes ({error}).")
    tokenizer = build(description["tokenizer"], trusted=trusted) if description["tokenizer"] else None
    return model.eval(), tokenizer


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError):
        refuse("ckpt_path", f"{path} is not a checkpoint, or is damaged; give a .ckpt file of a finished save.")
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint or "state_dict" not in checkpoint:
        refuse("ckpt_path", f"{path} was not written by this package: it does not describe its model.")
    return checkpoint
