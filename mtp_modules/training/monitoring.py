"""Monitoring beside the loss: gradient norms, gradient conflict between horizons, and throughput."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.core.targets import count_targets
from mtp_modules.model import MTPModel
from mtp_modules.training.flops import step_flops
from mtp_modules.training.normalisation import data_parallel


def logs_this_step(trainer: Trainer) -> bool:
    """Return whether loggers write after this step, or it is the first one, which the progress bar shows.

    Args:
        trainer: Of the run.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # lightning sets it dynamically
    return trainer.global_step == 0 or (every > 0 and (trainer.global_step + 1) % every == 0)


def gradient_norms(model: MTPModel, *, loss_scale: float = 1.0) -> dict[str, Float[Tensor, ""]]:
    """Return the norm of the gradient of ``trunk``, ``heads`` and ``unembedding``.

    A parameter counts once, in the first part that has it: a tied output matrix in the trunk. A part without parameters
    of its own is left out. Where parameters are sharded, the norm is that of the whole gradient; every rank must call.

    Args:
        model: After its backward pass.
        loss_scale: Factor that is still on the gradients.
    """
    counted: set[int] = set()
    norms = {}
    for name in ("trunk", "heads", "unembedding"):
        own = [parameter for parameter in getattr(model, name).parameters() if id(parameter) not in counted]
        counted.update(id(parameter) for parameter in own)
        if own:
            gradients = [parameter.grad for parameter in own if parameter.grad is not None]
            norms[name] = _total_norm(gradients, own[0].device) / loss_scale
    return norms


def _total_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the norm of all gradients, grouped by device mesh, since torch does not mix meshes in one operation."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros((), device=device)


def pending_loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return the loss scale that is still on the gradients just before the optimizer's step: 1 in most cases.

    Lightning unscales gradients before ``on_before_optimizer_step``, unless the optimizer does so in its own step
    (``fused=True``).

    Args:
        trainer: With the precision plugin that may hold a scaler.
        optimizer: About to step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def gradient_conflict(near: Sequence[Tensor], far: Sequence[Tensor]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the cosine between two gradients, and the second's norm over the first's.

    A gradient of zero has no direction: then the cosine is 0. The ratio is infinite if only the first is zero.

    Args:
        near: One gradient, a tensor for every parameter.
        far: The other, in the same order.
    """
    products = torch.zeros(3, dtype=torch.float64, device=near[0].device)
    for first, second in zip(near, far, strict=True):
        first, second = first.flatten(), second.flatten()
        wide = torch.promote_types(first.dtype, torch.float32)
        first, second = first.to(wide), second.to(wide)
        products += torch.stack((first @ second, first @ first, second @ second))
    dot, near_square, far_square = products
    cosine = dot / (near_square.sqrt() * far_square.sqrt())  # the product of the squares may underflow
    ratio = (far_square / near_square).sqrt()
    zero = (near_square == 0) | (far_square == 0)
    return torch.where(zero, 0.0, cosine), torch.where(far_square == 0, 0.0, ratio)


class GradientConflict(Callback):
    """Log whether the trunk's gradient from the horizons beyond the first agrees with that from the next token.

    ``train/grad_cosine`` is the cosine between the gradient of horizon 1's loss, over all parameters of the trunk (a
    tied output matrix is one of them), and that of the other horizons' weighted loss. Above 0 the other horizons help
    the next token, below 0 they work against it. ``train/grad_ratio`` is the other horizons' norm over horizon 1's,
    both with their weights. After Du et al. 2018 (arXiv 1812.02224), who let an auxiliary loss count by this cosine.

    Both gradients are taken on the batch that the step trains on (the first one, if it accumulates), at the same
    sampled positions, and added up over the ranks before they are compared. That costs two more forward and backward
    passes, and memory for two gradients of the trunk. Training stays bit-identical: no ``.grad`` is touched, and the
    random state is restored. A probe whose gradients overflow in float16 logs nothing.

    Args:
        every_n_steps: Optimizer steps between two probes. Loggers write a probe only at their own steps, so use a
            multiple of the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: If ``every_n_steps`` is below 1, there is one horizon only, nothing in the trunk trains, or the
            strategy shards the trunk.
    """

    def __init__(self, *, every_n_steps: int = 100) -> None:
        whole(self, "every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self._probed = -1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Raise an error before training if the gradients cannot be probed."""
        if stage != "fit":
            return
        model: MTPModel = pl_module.model
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            refuse(
                self,
                f"needs the whole trunk on every rank, which {type(trainer.strategy).__name__} does not give; "
                "use DDPStrategy or one device, or leave the callback out.",
            )
        if len(model.horizons) == 1:
            refuse(self, "needs at least 2 horizons to compare, got 1; leave the callback out.")
        if not any(parameter.requires_grad for parameter in model.trunk.parameters()):
            refuse(self, "needs a trunk that trains, but all of its parameters are frozen; leave the callback out.")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Reset the state of an earlier run."""
        self._probed = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Probe every ``every_n_steps`` steps, before the step is taken."""
        step = trainer.global_step
        if (step + 1) % self.every_n_steps or step == self._probed:
            return
        self._probed = step
        weights = pl_module.horizon_weights()
        near = self._gradients(trainer, pl_module, batch, [weights[0], *(0.0 for _ in weights[1:])])
        far = self._gradients(trainer, pl_module, batch, [0.0, *weights[1:]])
        cosine, ratio = gradient_conflict(near, far)
        if cosine.isfinite():  # it is not if any gradient overflowed
            pl_module.log_dict({"train/grad_cosine": cosine.float(), "train/grad_ratio": ratio.float()})

    def _gradients(
        self, trainer: Trainer, module: Any, batch: dict[str, Tensor], weights: list[float]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the trunk's parameters, over the batches of all ranks, with these weights."""
        strategy, device = trainer.strategy, module.device
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        trained = [parameter for parameter in module.model.trunk.parameters() if parameter.requires_grad]
        counts = None
        if trainer.world_size > 1:
            given = (batch["tokens"], module.horizons, batch.get("document_ids"), batch.get("loss_mask"))
            counts = strategy.reduce(count_targets(*given), reduce_op="sum")
        on_cpu = device.type == "cpu"
        with (
            torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type),
            trainer.precision_plugin.train_step_context(),
        ):
            loss = module(batch, counts=counts, weights=weights, auxiliary=False).loss
        if scaler is not None:
            loss = loss * scaler.get_scale()  # as in training, so that float16 does not underflow
        gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        if trainer.world_size == 1:
            return gradients
        return tuple(strategy.reduce(gradient, reduce_op="sum") for gradient in gradients)


class TokenThroughput(Callback):
    """Log the training throughput, through Lightning's :class:`~lightning.fabric.utilities.throughput.Throughput`.

    ``train/tokens_per_second`` (positions that the trunk reads) and ``train/samples_per_second`` are those of all ranks
    together; ``train/tflops_per_second`` and ``train/mfu`` those of one device, counted by
    :func:`~mtp_modules.training.training_flops`. All are means since the last time they were logged. Validation, and
    the checkpoint saved after it, are left out; every other wait counts. :class:`~mtp_modules.training.MTPModule` adds
    this callback to every run; give one of your own to set the peak.

    Lightning's ``ThroughputMonitor`` synchronises the device at every batch, logs nothing in the first 100, and takes
    its peak from a table that cannot be overridden. The table has no entry for a device named "NVIDIA H200", and has
    the peak of sparse products for the H100 NVL; under FSDP2's mixed precision, it is looked up for float32. Give
    ``available_flops`` there.

    Args:
        available_flops: Peak of one device in floating-point operations per second, of dense products in the precision
            of the run; Lightning's value for the device if ``None``. Without a peak ``train/mfu`` is not logged.

    Raises:
        ValueError: If ``available_flops`` is not above 0.
    """

    def __init__(self, *, available_flops: float | None = None) -> None:
        if available_flops is not None and not available_flops > 0:
            refuse(self, f"available_flops must be above 0, got {available_flops}; leave it out if it is unknown.")
        self.available_flops = available_flops
        self._throughput: Throughput | None = None
        self._paused: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        device = trainer.strategy.root_device
        peak = self.available_flops or get_available_flops(device, _compute_dtype(str(trainer.precision)))
        self._replicas, _ = data_parallel(trainer)
        self._world_size = trainer.world_size
        self._batches = self._samples = self._tokens = 0
        self._flops = 0.0
        self._logged_step = trainer.global_step
        # A window of two entries gives the rate since the previous entry. The counts include the world size, because
        # ranks that share a batch (tensor parallelism) must not count it twice.
        self._throughput = Throughput(available_flops=peak, window_size=2)
        self._throughput.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)
        self._paused, self._started = None, _now(device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Resume the clock after a validation."""
        if self._paused is not None:
            self._started += time.perf_counter() - self._paused
            self._paused = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch, and log at the steps that loggers write."""
        assert self._throughput is not None
        self._count(pl_module, batch)
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]  # set dynamically
        if not every or step % every or step == self._logged_step:
            return
        self._logged_step = step
        self._throughput.update(
            time=_now(trainer.strategy.root_device) - self._started,
            batches=self._batches,
            samples=self._samples,
            lengths=self._tokens,
            flops=self._flops,  # type: ignore[arg-type]  # fractional where ranks share operations
        )
        self._flops = 0.0
        rates = self._throughput.compute()
        logged = {
            "train/tokens_per_second": rates["device/items_per_sec"],
            "train/samples_per_second": rates["device/samples_per_sec"],
            "train/tflops_per_second": rates["device/flops_per_sec"] / 1e12,
        }
        if "device/mfu" in rates:
            logged["train/mfu"] = rates["device/mfu"]
        pl_module.log_dict(logged)

    def _count(self, module: Any, batch: dict[str, Tensor]) -> None:
        rows, length = batch["tokens"].shape[0], batch["tokens"].shape[1] - module.lookahead
        flops = step_flops(module, batch_size=rows, length=length)
        self._batches += 1
        self._samples += rows * self._replicas
        self._tokens += rows * length * self._replicas
        self._flops += flops * self._replicas / self._world_size

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock for a validation inside training."""
        if self._throughput is not None and self._paused is None:
            self._paused = _now(trainer.strategy.root_device)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._throughput = self._paused = None


def _now(device: torch.device) -> float:
    """Return the time after the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _compute_dtype(precision: str) -> torch.dtype:
    """Return the compute precision of a trainer, from its flag such as ``"bf16-mixed"``."""
    known = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}
    return known.get(precision.partition("-")[0], torch.float32)
