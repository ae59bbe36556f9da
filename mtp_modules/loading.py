"""Load a model from a checkpoint or a folder of ``save_pretrained``, without Lightning."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mtp_modules.core.auxiliary import AuxiliaryObjective
from mtp_modules.core.budget import named_values
from mtp_modules.core.checks import InputError, refuse
from mtp_modules.core.checksums import CHECKSUMS, damaged_file, damaged_record
from mtp_modules.core.component import build, build_within
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.pickles import check_pickle, check_shards, load_pickle
from mtp_modules.core.shapes import Tensor
from mtp_modules.model import MTPModel
from mtp_modules.pretrained import check_format

CHECKPOINT_KEY = "mtp_modules"
"""Key of a training checkpoint with the description of its model and tokenizer."""

_PREFERRED = ("best.ckpt", "last.ckpt")
_SHARDED = "meta.pt"
"""Lightning's name for the metadata file of a sharded checkpoint."""


def load_model(path: str | Path, *, trusted: tuple[str, ...] = ("mtp_modules",)) -> tuple[MTPModel, Tokenizer | None]:
    """Build the model, and the tokenizer if one was saved, from a checkpoint alone.

    Args:
        path: Any path that :func:`find_checkpoint` accepts. Only tensors and plain values are unpickled.
        trusted: Top-level packages whose classes may be built.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If the file is not a checkpoint of this package, its weights do not fit, or it is sharded.
    """
    path = find_checkpoint(path)
    if is_sharded(path):
        refuse(
            "ckpt_path",
            f"{path} is a folder of shards, which only a run with ModelParallelStrategy can read; "
            "let it save one file with save_distributed_checkpoint: false.",
        )
    if path.is_dir():
        return MTPModel.from_pretrained(path, trusted=trusted)
    checkpoint = read_checkpoint(path)
    prefix = "model."
    state = {name[len(prefix) :]: value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)}
    shapes = {name: value.shape for name, value in state.items()}
    described = checkpoint[CHECKPOINT_KEY]
    model: MTPModel = build_within(shapes, "ckpt_path", described["model"], trusted=trusted, role=MTPModel)
    check_weights(model, state, path)
    model.load_state_dict(state)
    tokenizer = build(found, trusted=trusted, role=Tokenizer) if (found := described.get("tokenizer")) else None
    return model.eval(), tokenizer


def load_objectives(path: str | Path, *, trusted: tuple[str, ...] = ("mtp_modules",)) -> dict[str, AuxiliaryObjective]:
    """Build the auxiliary objectives of a training checkpoint, which :func:`load_model` leaves out.

    Args:
        path: Any path that :func:`find_checkpoint` accepts.
        trusted: Top-level packages whose classes may be built.

    Returns:
        Each with its weights, in evaluation mode, by its name; none if the model was trained without, or saved for
        decoding.

    Raises:
        ValueError: If the file is not a checkpoint of this package, their weights do not fit, or it is sharded.
    """
    path = find_checkpoint(path)
    if path.is_dir() and not is_sharded(path):
        return {}
    if is_sharded(path):
        refuse("ckpt_path", f"{path} is a folder of shards; let the run save one file.")
    checkpoint, found = read_checkpoint(path), dict[str, AuxiliaryObjective]()
    for index, description in enumerate(checkpoint[CHECKPOINT_KEY].get("objectives") or ()):
        prefix = f"objectives.{index}."
        stored = checkpoint["state_dict"].items()
        state = {name[len(prefix) :]: value for name, value in stored if name.startswith(prefix)}
        shapes = {name: value.shape for name, value in state.items()}
        made: AuxiliaryObjective = build_within(
            shapes, "ckpt_path", description, trusted=trusted, role=AuxiliaryObjective
        )
        check_weights(made, state, path)
        made.load_state_dict(state)
        found[made.name] = made.eval()
    return found


def find_checkpoint(path: str | Path, *, preferred: Sequence[str] = _PREFERRED) -> Path:
    """Return the checkpoint of a path: itself, or the best of a run's folder, else the last, else the newest.

    Args:
        path: A file, a run's folder, or a folder that is a checkpoint itself: shards, or the output of
            ``save_pretrained`` (returned unchanged).
        preferred: Names to look for in a run's folder, in this order.

    Raises:
        ValueError: If the path does not exist, or has no checkpoint in it.
    """
    path = Path(path)
    if not path.exists():
        refuse("ckpt_path", f"{path} does not exist; give a checkpoint file, or the folder of a run.")
    if path.is_file() or (path / "model.safetensors").is_file() or is_sharded(path):
        return path
    found = [file for folder in (path, path / "checkpoints") for file in folder.glob("*.ckpt")]
    if not found:
        refuse("ckpt_path", f"{path} holds no checkpoint; give a checkpoint file, or the folder of a run.")
    for name in preferred:
        for file in found:
            if file.name == name:
                return file
    return max(found, key=lambda file: file.stat().st_mtime)


def is_sharded(path: Path) -> bool:
    """Return whether a checkpoint is a folder of shards, one per process.

    Args:
        path: Of the checkpoint.
    """
    return (path / _SHARDED).is_file()


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this package.

    Args:
        path: A file, or a folder of shards, whose weights are left out. Only tensors and plain values are unpickled.
        mapped: Memory-map the tensors of a file, which must stay in place while they are used.

    Raises:
        ValueError: If it is not a checkpoint, or not one of this package.
    """
    sharded = is_sharded(path)
    _check_whole(path)
    file = path / _SHARDED if sharded else path
    checkpoint = _read(path, lambda: load_pickle("ckpt_path", file, mapped=mapped and not sharded))
    if sharded:
        check_shards("ckpt_path", path)
    needed = {CHECKPOINT_KEY} if sharded else {CHECKPOINT_KEY, "state_dict"}
    described = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(described, dict) or not needed <= checkpoint.keys():
        refuse("ckpt_path", f"{path} was not written by this package: it does not describe its model.")
    named_values("ckpt_path", described)
    check_format("ckpt_path", described.get("format"), path)
    state = checkpoint.get("state_dict", {})
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        refuse("ckpt_path", f"{path} has weights that are no tensors with names; give a .ckpt file of a finished save.")
    if not isinstance(described.get("model"), dict):
        refuse("ckpt_path", f"{path} does not describe its model; give a .ckpt file of a finished save.")
    return checkpoint


def check_files(path: Path) -> None:
    """Raise an error for a checkpoint that is not safe to load, without loading it.

    Args:
        path: A file, or a folder of shards.

    Raises:
        ValueError: If it holds anything but tensors and plain values, is damaged, or asks for more memory
            than it is long.
    """
    _check_whole(path)
    sharded = is_sharded(path)
    _read(path, lambda: check_pickle("ckpt_path", path / _SHARDED if sharded else path))
    if sharded:
        check_shards("ckpt_path", path)


def _read(path: Path, read: Callable[[], Any]) -> Any:
    """Read a file; whatever is raised for a damaged one becomes a sentence."""
    try:
        return read()
    except InputError:
        raise
    except Exception:  # an invalid pickle can raise anything
        refuse("ckpt_path", f"{path} is not a checkpoint, or is damaged; {_whole_one(path)}.")


def _check_whole(path: Path) -> None:
    """Raise an error for a damaged checkpoint, by the checksums of its tensors or files."""
    if (damaged := _damaged(path)) is None:
        return
    if not damaged:  # no checkpoint at all, perhaps
        _read(path, lambda: check_pickle("ckpt_path", path))
        refuse("ckpt_path", f"{path} is not a checkpoint, or is damaged; {_whole_one(path)}.")
    refuse("ckpt_path", f"{path} is damaged: {damaged} is not what was saved; {_whole_one(path)}.")


def _damaged(path: Path) -> str | None:
    """Return what is damaged in a checkpoint; ``None`` if nothing is, or its shards were saved without checksums."""
    if is_sharded(path):
        return damaged_file(path) if (path / CHECKSUMS).is_file() else None
    return damaged_record(path)


def _whole_one(path: Path) -> str:
    """Return what to give instead of a damaged checkpoint: the newest one beside it that is not damaged."""
    beside = sorted(path.parent.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
    whole = next((file for file in beside if file != path and _damaged(file) is None), None)
    return f"the newest one that is whole is {whole}" if whole else "give a .ckpt file of a finished save"


def check_weights(module: nn.Module, state: Mapping[str, Tensor], origin: object) -> None:
    """Raise an error for weights that do not fit a module.

    Args:
        module: Module that will load them.
        state: Weights by name.
        origin: Where they come from, for the error message.

    Raises:
        ValueError: If a name is missing, unknown, or has another shape.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            has, needs = found.get(name, "nothing"), expected.get(name, "nothing")
            refuse(
                "ckpt_path", f"the weights in {origin} do not fit the model: {name} is {has}, the model has {needs}."
            )
