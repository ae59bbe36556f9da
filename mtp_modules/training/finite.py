"""Stop, or skip a step, before a loss or a gradient that is not finite reaches the weights."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.shapes import Float, Tensor

_SCALER_LIMIT = 40
"""How often in a row a loss scale is halved before the fault lies elsewhere; float16 needs about 16 from 2**16."""


class FiniteSteps:
    """Look at the loss and the gradients of every optimizer step before the update.

    Under 16-mixed precision a gradient beyond float16 is ordinary: the loss scaler skips the step itself, and only very
    many in a row stop the run.

    Args:
        limit: How many steps in a row may be skipped.

    Attributes:
        skipped: Steps skipped in this run.

    Raises:
        ValueError: If ``limit`` is no whole number, or below 0.
    """

    def __init__(self, limit: int) -> None:
        self.limit = whole("MTPModule", "skip_non_finite", limit, 0)
        self.reset()

    def reset(self) -> None:
        """Begin a run."""
        self.skipped = self._in_a_row = 0
        self._loss: Tensor | None = None

    def add(self, loss: Float[Tensor, ""]) -> None:
        """Note the loss of a batch of the step.

        Args:
            loss: Of the batch.
        """
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def check(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Stop the run if the step is not finite, or drop its gradients, so that the optimizer changes nothing.

        Args:
            trainer: Of the run.
            module: With gradients that are not scaled any more.
            optimizer: Whose learning rate the error message names.

        Raises:
            ValueError: If more than ``limit`` steps in a row were not finite.
        """
        loss, self._loss = self._loss, None
        seen = _largest(module) if loss is None else loss + _largest(module).to(loss)
        finite = seen.isfinite()
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce(finite.float(), reduce_op="sum") == trainer.world_size
        if bool(finite):
            self._in_a_row = 0
            return
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        finite_loss = loss is None or bool(loss.isfinite())
        if self._in_a_row > (_SCALER_LIMIT if scaled and finite_loss else self.limit):
            self._stop(trainer, module, loss, optimizer)
        module.log("train/skipped_steps", float(self.skipped))
        if not scaled:
            for parameter in module.parameters():
                parameter.grad = None

    def _stop(self, trainer: Trainer, module: nn.Module, loss: Tensor | None, optimizer: Optimizer) -> None:
        bad = next((name for name, p in module.named_parameters() if p.grad is not None and not _finite(p.grad)), None)
        value = math.nan if loss is None else float(loss) / trainer.accumulate_grad_batches
        what = f"the loss is {value:.3g}" if not math.isfinite(value) else f"the gradient of {bad} is not finite"
        if bad is None and math.isfinite(value):
            what = "a loss or gradient of another process is not finite"
        rate, clip = optimizer.param_groups[0]["lr"], trainer.gradient_clip_val
        lower = f"lower the learning rate (now {float(rate):.3g})"
        lower += " or set trainer.gradient_clip_val" if clip is None else f" or trainer.gradient_clip_val ({clip})"
        row = f", as in the {self._in_a_row - 1} steps before" if self._in_a_row > 1 else ""
        refuse(
            "fit",
            f"{what} at step {trainer.global_step + 1} (batch {trainer.fit_loop.epoch_loop.batch_idx} of epoch "
            f"{trainer.current_epoch}){row}; the weights are those before it. Look at that batch, {lower}, or let "
            "model.skip_non_finite pass over such steps.",
        )


def check_finite_weights(module: nn.Module, trainer: Any) -> None:
    """Raise an error if a weight is not finite, so that no checkpoint of it replaces a good one.

    Args:
        module: About to be saved.
        trainer: Of the run; ``None`` if there is none.

    Raises:
        ValueError: If there is such a weight.
    """
    bad = next((name for name, parameter in module.named_parameters() if not _finite(parameter)), None)
    step, anywhere = "", bad is not None
    if trainer is not None:  # ranks that hold different shards must agree, for the others go on to wait for this one
        step = f" after step {trainer.global_step}"
        anywhere = not trainer.strategy.reduce_boolean_decision(bad is None, all=True)
    if anywhere:
        refuse(
            "saving",
            f"{bad or 'a weight of another process'} is not finite{step}, so nothing was saved; resume from the last "
            "checkpoint with a lower learning rate.",
        )


def _largest(module: nn.Module) -> Float[Tensor, ""]:
    """Return the largest absolute value of all local gradients, NaN if one is."""
    local = [_local(parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
    if not local:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm([gradient for gradient in local if gradient.numel()], norm_type=math.inf)


def _finite(tensor: Tensor) -> bool:
    local = _local(tensor.detach())
    return not local.is_floating_point() or bool(local.isfinite().all())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
