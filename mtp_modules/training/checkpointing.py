"""Content of Lightning's checkpoints of a module, and checks that they fit it."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from mtp_modules.core.budget import Budget
from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Description, build, class_paths, describe
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.loading import CHECKPOINT_KEY, check_weights
from mtp_modules.model import MTPModel
from mtp_modules.pretrained import check_format


def check_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise an error for a checkpoint of another layout, or with the weights of another model.

    Args:
        module: Module that will load the weights; its attribute ``model`` is an :class:`~mtp_modules.MTPModel`.
        checkpoint: As Lightning loads it.

    Raises:
        ValueError: If the layout is another, or a name is missing, unknown, or has another shape.
    """
    check_format("ckpt_path", checkpoint.get(CHECKPOINT_KEY, {}).get("format"), "the checkpoint")
    if "state_dict" in checkpoint:
        check_weights(module, checkpoint["state_dict"], "the checkpoint")
    else:  # ModelParallelStrategy has loaded them already, and ignores what the model does not have
        check_description(module, checkpoint[CHECKPOINT_KEY]["model"], "the checkpoint")


def check_description(module: nn.Module, description: Description, origin: object) -> None:
    """Raise an error for weights of another model, by its description alone, where the weights are not available.

    A described model that is not the configured one is built on the meta device to compare their shapes, if it
    consists of classes that the configured model names.

    Args:
        module: Module that will load the weights; its attribute ``model`` is an :class:`~mtp_modules.MTPModel`.
        description: Of the saved model.
        origin: Where they come from, for the error message.

    Raises:
        ValueError: If a name is missing, unknown, or has another shape, or a class is not in the configured model.
    """
    named, configured = class_paths(description), describe(cast("MTPModel", module.model))
    if description == configured:
        return
    if strange := sorted(named - class_paths(configured)):
        refuse(
            "ckpt_path",
            f"{origin} holds a model with a {strange[0]!r:.100}, which the configured model does not have; give the "
            "configuration that the model was trained with.",
        )
    with torch.device("meta"), Budget("ckpt_path", [value.shape for value in module.state_dict().values()]) as budget:
        budget.check_counts(description)
        packages = {path.partition(".")[0] for path in named}
        saved: MTPModel = build(description, trusted=tuple(packages), role=MTPModel)
    check_weights(module, {f"model.{name}": value for name, value in saved.state_dict().items()}, origin)


def in_model_order(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Number the parameters in an optimizer's state in the order of the module, not of its groups.

    ``Optimizer.load_state_dict`` maps by the order in the groups and accepts either. Where Lightning loads the state
    into a sharded model, it treats the numbers as places in the module, and would mix up the parameters otherwise.

    Args:
        state: ``optimizer.state_dict()``.
        optimizer: The optimizer of that state.
        module: The module that it trains.
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
    """Return the default random generator of a device.

    Args:
        device: Of the model.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def tokenizer_of(trainer: Any) -> Tokenizer | None:
    """Return the tokenizer of a trainer's data module, or ``None``.

    Args:
        trainer: The trainer; ``None`` if there is none.
    """
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None
