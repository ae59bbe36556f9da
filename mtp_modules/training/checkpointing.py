"""Find a checkpoint and build the model that it describes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Description, build
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.shapes import Tensor
from mtp_modules.model import MTPModel, check_format

CHECKPOINT_KEY = "mtp_modules"
"""Where a training checkpoint keeps the description of its model and tokenizer."""

_PREFERRED = ("best.ckpt", "last.ckpt")
_SHARDED = "meta.pt"
"""What Lightning calls the file beside the shards of a checkpoint that is a folder."""


def find_checkpoint(path: str | Path, *, preferred: Sequence[str] = _PREFERRED) -> Path:
    """Return the checkpoint that a path means: itself, or the best of a run's folder, else the last, else the newest.

    Args:
        path: A file, a run's folder, or a folder that is a checkpoint itself: shards, or what ``save_pretrained`` wrote
            (returned as it is).
        preferred: Names to look for in a run's folder, in this order.

    Raises:
        ValueError: If there is nothing there, or no checkpoint in it.
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
    """Tell whether a checkpoint is a folder of shards, one of each process, as large runs write it.

    Args:
        path: Of the checkpoint.
    """
    return (path / _SHARDED).is_file()


def load_model(path: str | Path, *, trusted: tuple[str, ...] = ("mtp_modules",)) -> tuple[MTPModel, Tokenizer | None]:
    """Build the model, and the tokenizer if one is known, from a checkpoint alone.

    Args:
        path: Whatever :func:`find_checkpoint` understands. Nothing in it is unpickled but tensors and plain values.
        trusted: Top-level packages whose classes may be built.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If the file is no checkpoint of this package, its weights do not fit, or it is a folder of shards.
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
    description = checkpoint[CHECKPOINT_KEY]
    model: MTPModel = build(description["model"], trusted=trusted)
    prefix = "model."
    state = {name[len(prefix) :]: value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)}
    check_weights(model, state, path)
    model.load_state_dict(state)
    tokenizer = build(description["tokenizer"], trusted=trusted) if description["tokenizer"] else None
    return model.eval(), tokenizer


def check_weights(module: nn.Module, state: Mapping[str, Tensor], origin: object) -> None:
    """Refuse weights that are not those of a module.

    Args:
        module: That shall take them.
        state: Its weights by name.
        origin: Where they come from, for the sentence.

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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this package into memory.

    Args:
        path: A file, or a folder of shards, whose weights are left out. Nothing in it is unpickled but tensors and
            plain values.

    Raises:
        ValueError: If it is no checkpoint, or not one of this package.
    """
    sharded = is_sharded(path)
    try:
        checkpoint = torch.load(path / _SHARDED if sharded else path, map_location="cpu", weights_only=True)
    except Exception:  # what is no pickle makes an unpickler fail in any way
        refuse("ckpt_path", f"{path} is not a checkpoint, or is damaged; give a .ckpt file of a finished save.")
    needed = {CHECKPOINT_KEY} if sharded else {CHECKPOINT_KEY, "state_dict"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        refuse("ckpt_path", f"{path} was not written by this package: it does not describe its model.")
    check_format("ckpt_path", checkpoint[CHECKPOINT_KEY].get("format"), path)
    return checkpoint


def check_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another layout, or with the weights of another model.

    Args:
        module: That shall take the weights; its attribute ``model`` is an :class:`~mtp_modules.MTPModel`.
        checkpoint: As Lightning has read it.

    Raises:
        ValueError: If the layout is another, or a name is missing, unknown, or has another shape.
    """
    check_format("ckpt_path", checkpoint.get(CHECKPOINT_KEY, {}).get("format"), "the checkpoint")
    if "state_dict" in checkpoint:
        check_weights(module, checkpoint["state_dict"], "the checkpoint")
    else:  # ModelParallelStrategy has loaded them already, and ignores what the model does not have
        check_description(module, checkpoint[CHECKPOINT_KEY]["model"], "the checkpoint")


def check_description(module: nn.Module, description: Description, origin: object) -> None:
    """Refuse the weights of another model by its description alone, where the weights themselves are not at hand.

    Args:
        module: That shall take the weights; its attribute ``model`` is an :class:`~mtp_modules.MTPModel`.
        description: Of the model that they were saved from.
        origin: Where they come from, for the sentence.

    Raises:
        ValueError: If a name is missing, unknown, or has another shape.
    """
    with torch.device("meta"):
        saved: MTPModel = build(description, trusted=_origins(description))
    check_weights(module, {f"model.{name}": value for name, value in saved.state_dict().items()}, origin)


def _origins(description: Any) -> tuple[str, ...]:
    """Return the top-level packages of all classes in a description; only for one whose weights are in use already."""
    if isinstance(description, Mapping):
        own = {str(description["class_path"]).partition(".")[0]} if "class_path" in description else set()
        return tuple(own.union(*map(_origins, description.values())))
    return ()


def in_model_order(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Number the parameters in an optimizer's state as the module lists them, not as its groups do.

    ``Optimizer.load_state_dict`` goes by the order in the groups and takes either. Where Lightning loads the state into
    a sharded model, it takes the numbers for places in the module, and would mix up the parameters otherwise.

    Args:
        state: ``optimizer.state_dict()``.
        optimizer: Whose state it is.
        module: Whose parameters it trains.
    """
    place = {parameter: index for index, parameter in enumerate(module.parameters())}
    number = {
        old: place[parameter]
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for old, parameter in zip(saved["params"], group["params"], strict=True)
    }
    return {
        **state,
        "state": {number[old]: value for old, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[old] for old in group["params"]]} for group in state["param_groups"]
        ],
    }


def generator_of(device: torch.device) -> torch.Generator:
    """Return the generator that a device draws from unless it is told another.

    Args:
        device: Of the model.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def tokenizer_of(trainer: Any) -> Tokenizer | None:
    """Return the tokenizer of the data that a trainer works on.

    Args:
        trainer: ``None`` if there is none.
    """
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None
