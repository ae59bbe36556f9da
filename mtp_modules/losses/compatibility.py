"""What does not go together: options of the multi-token loss, heads, teachers and counts."""

from typing import Protocol, runtime_checkable

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.objective import NextTokenTeacher
from mtp_modules.core.shapes import Shaped, Tensor


@runtime_checkable
class Options(Protocol):
    """The options that are looked at; see :class:`~mtp_modules.MultiTokenLoss`."""

    distillation: float
    total_variation: float
    label_smoothing: float
    z_loss: float
    balance: float
    confidence_target: str


def check_counts(owner: Options, counts: Shaped[Tensor, " H"], num_horizons: int) -> None:
    """Reject counts of another number of horizons, and invalid ones where reading them waits for no device.

    Args:
        owner: The loss.
        counts: Valid targets per horizon.
        num_horizons: How many there are.

    Raises:
        ValueError: If they are rejected.
    """
    if counts.shape != (num_horizons,):
        refuse(owner, f"counts must hold one number per horizon ({num_horizons}), got shape {tuple(counts.shape)}.")
    if counts.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        refuse(owner, f"counts must be at least 0 and finite, got {counts.tolist()}.")


def check_mixture(owner: Options, heads: object, inputs: Tensor | None, teacher: NextTokenTeacher | None) -> None:
    """Reject options that are undefined for the likelihood of a joint distribution.

    Args:
        owner: The loss.
        heads: With a joint distribution.
        inputs: What the model reads instead of the tokens.
        teacher: Another model.

    Raises:
        ValueError: If one is given.
    """
    for name in ("distillation", "total_variation", "label_smoothing", "z_loss"):
        if value := getattr(owner, name):
            refuse(owner, f"{name} is {value}, but {type(heads).__name__} do not support it; set it to 0.")
    for name, part in (("inputs", inputs), ("a teacher", teacher)):
        if part is not None:
            refuse(owner, f"{name} is given, but {type(heads).__name__} do not support it; leave it out.")


def check_single_states(owner: Options, heads: object, other: NextTokenTeacher | None) -> None:
    """Reject ``balance`` without components, two teachers, imitation without one, and overlap with another model.

    Args:
        owner: The loss.
        heads: With one state per horizon.
        other: Another model that teaches.

    Raises:
        ValueError: If they are rejected.
    """
    if owner.balance:
        refuse(owner, f"balance is {owner.balance}, but {type(heads).__name__} have no components; set it to 0.")
    if other is not None and owner.confidence_target == "overlap":
        refuse(
            owner,
            "confidence_target: overlap is that with horizon 1, and another model is the teacher; take argmax, or "
            "distillation in its place.",
        )
    if other is not None and owner.distillation > 0.0:
        refuse(owner, f"distillation is {owner.distillation}, but there is a teacher already; set it to 0.")
    if other is None and owner.distillation == 0.0 and owner.total_variation > 0.0:
        refuse(
            owner,
            f"total_variation is {owner.total_variation}, but there is no teacher; set distillation above 0, "
            "give a teacher, or leave it out.",
        )
