"""What Lightning's checkpoints of a module hold, and whether they fit it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import CheckpointIO
from torch import nn
from torch.optim import Optimizer

from mtp_modules.core.component import Description, build
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.loading import CHECKPOINT_KEY, check_weights
from mtp_modules.model import MTPModel, check_format


class HeldCheckpoint(CheckpointIO):
    """Gives a trainer a checkpoint that was read before, so that its file is read once. All else is the trainer's own.

    Args:
        path: Where it was read from.
        checkpoint: What was read; let go of when it is given.
    """

    def __init__(self, path: Path, checkpoint: dict[str, Any]) -> None:
        self.path, self._checkpoint = path, checkpoint
        self._own: CheckpointIO | None = None

    def put_into(self, trainer: Trainer) -> None:
        """Stand before what the trainer reads and writes checkpoints with.

        Args:
            trainer: Before it runs.
        """
        self._own = trainer.strategy.checkpoint_io
        trainer.strategy.checkpoint_io = self

    @property
    def own(self) -> CheckpointIO:
        """What the trainer itself reads and writes with."""
        assert self._own is not None
        return self._own

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what was read, the first time that it is asked for."""
        if self._checkpoint and Path(path) == self.path:
            found, self._checkpoint = self._checkpoint, {}
            return found
        placed = {} if map_location is None else {"map_location": map_location}
        return self.own.load_checkpoint(path, weights_only=weights_only, **placed)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write as the trainer does."""
        self.own.save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove as the trainer does."""
        self.own.remove_checkpoint(path)

    def teardown(self) -> None:
        """End what the trainer's own has under way."""
        self.own.teardown()


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
