"""Separate learning rates for parts of a model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mtp_modules.core.checks import InputError, refuse
from mtp_modules.model import MTPModel
from mtp_modules.training.freezing import FREEZABLE
from mtp_modules.training.optimizers import muon_parameter_groups

SCALE = "lr_scale"
"""Key of a parameter group: what its learning rate is multiplied with."""


def check_scales(owner: object, model: MTPModel, scales: Mapping[str, float]) -> None:
    """Reject learning-rate factors of parts that are unknown or not trained.

    Args:
        owner: Named in the error message.
        model: With its frozen parts frozen.
        scales: A factor for each part.

    Raises:
        ValueError: If a part is unknown, frozen or has no parameters of its own, or a factor is not above 0.
    """
    for part, scale in scales.items():
        if part not in FREEZABLE:
            refuse(owner, f"lr_scales may name {', '.join(FREEZABLE)}, got {part!r}.")
        if not 0 < scale < float("inf"):
            refuse(owner, f"lr_scales.{part} must be a finite number above 0, got {scale}; freeze it to leave it out.")
        if not any(owner_of == part for owner_of in _parts_of(model).values()):
            refuse(
                owner,
                f"lr_scales names {part}, which has nothing to train: it is frozen, or the trunk owns its matrix; "
                "leave it out.",
            )


def scaled_optimizer(
    make: Callable[[list[dict[str, Any]]], Optimizer],
    model: MTPModel,
    scales: Mapping[str, float],
    others: nn.Module | None = None,
) -> Optimizer:
    """Make an optimizer of all that is trained, with each learning rate times the factor of its part.

    Args:
        make: Builds the optimizer from parameter groups.
        model: The model to train.
        scales: A factor for each part; 1 where there is none.
        others: What is trained beside the model.

    Raises:
        ValueError: If the optimizer rejects a number, or one is infinite or not a number.
    """
    groups = muon_parameter_groups(model if others is None else nn.ModuleList([model, others]))
    parts = _parts_of(model)
    if scales:
        groups = [cut for group in groups for cut in _by_scale(group, parts, scales)]
    try:
        optimizer = make(groups)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        refuse("model.optimizer", f"{str(error).rstrip('.')}; see the documentation of the optimizer for its range.")
    for name, value in optimizer.defaults.items():
        if isinstance(value, float) and not math.isfinite(value):
            refuse("model.optimizer", f"{name} must be finite, got {value}.")
    for group in optimizer.param_groups:
        group["lr"] *= group.get(SCALE, 1.0)
    return optimizer


def _by_scale(group: dict[str, Any], parts: Mapping[int, str], scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Split a parameter group by the factor of each parameter's part."""
    by_scale: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        by_scale.setdefault(scales.get(parts.get(id(parameter), ""), 1.0), []).append(parameter)
    return [{**group, "params": parameters, SCALE: scale} for scale, parameters in by_scale.items()]


def _parts_of(model: MTPModel) -> dict[int, str]:
    """Return which part trains each parameter; a tied output matrix is the trunk's."""
    parts: dict[int, str] = {}
    for part in FREEZABLE:
        for parameter in getattr(model, part).parameters():
            if parameter.requires_grad:
                parts.setdefault(id(parameter), part)
    return parts
