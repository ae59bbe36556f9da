"""Learning-rate schedules that take the length of the run from the trainer."""

import math
from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtp_modules.core.checks import at_least, fraction, refuse
from mtp_modules.core.component import Component
from mtp_modules.training.normalisation import run_length


class LearningRateSchedule(Component, ABC):
    """A factor on every learning rate, as a function of the progress of the run."""

    @abstractmethod
    def __call__(self, step: int, total: int) -> float:
        """Return the factor.

        Args:
            step: Optimizer steps taken.
            total: Optimizer steps of the whole run.
        """


class WarmupDecay(LearningRateSchedule):
    """Rise linearly, stay, and fall to a final share of the learning rate.

    Args:
        warmup_steps: Steps of the rise.
        decay_share: Share of the run that the fall takes, at its end; 1 falls from the end of the rise.
        final: Factor at the end.
        shape: ``"linear"`` or ``"cosine"``, the form of the fall.

    Raises:
        ValueError: If a number lies outside its range or the shape is unknown.

    Example:
        >>> schedule = WarmupDecay(warmup_steps=2, decay_share=0.5)
        >>> [schedule(step, 10) for step in (0, 1, 4, 9)]
        [0.5, 1.0, 1.0, 0.2]
    """

    def __init__(
        self, *, warmup_steps: int = 0, decay_share: float = 1.0, final: float = 0.0, shape: str = "linear"
    ) -> None:
        at_least(self, "warmup_steps", warmup_steps, 0)
        fraction(self, "decay_share", decay_share)
        fraction(self, "final", final)
        if shape not in ("linear", "cosine"):
            refuse(self, f"shape must be linear or cosine, got {shape!r}.")
        self.warmup_steps, self.decay_share, self.final, self.shape = warmup_steps, decay_share, final, shape

    def __call__(self, step: int, total: int) -> float:
        """Return the factor."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_steps = min(self.decay_share * total, total - self.warmup_steps)
        left = total - step
        if left >= decay_steps:
            return 1.0
        share = max(0.0, left / max(decay_steps, 1))
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.final + (1.0 - self.final) * share


def scheduled(optimizer: Optimizer, schedule: LearningRateSchedule, trainer: Trainer) -> dict[str, Any]:
    """Return an optimizer and its scheduler over the steps of a run, in Lightning's format.

    Args:
        optimizer: Just made.
        schedule: Factor on every learning rate.
        trainer: Of the run, whose length it provides.
    """
    total = run_length(trainer)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
