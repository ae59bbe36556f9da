"""Checks for unsupported trainer options: combinations that fail late, or go wrong silently."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.pickles import only_weights
from mtp_modules.data.module import accumulation_scheduler, most_accumulated
from mtp_modules.loading import check_files
from mtp_modules.training.checkpoint_io import AtomicCheckpointIO
from mtp_modules.training.limits import check_numbers

FSDP1 = (
    "is Lightning's FSDPStrategy, which wraps the first FSDP, cannot clip gradients by norm and is not tested here; "
    "take ModelParallelStrategy, as configs/overlays/fsdp2.yaml does."
)


def check_strategy_name(strategy: Any) -> None:
    """Reject unsupported strategies by their name in a configuration, before Lightning builds them.

    Args:
        strategy: A registered name, or the path of a class.

    Raises:
        ValueError: If it is Lightning's FSDP1.
    """
    if isinstance(strategy, str) and (strategy.startswith("fsdp") or strategy.rpartition(".")[2] == "FSDPStrategy"):
        refuse("trainer.strategy", FSDP1)


def loads_by_itself(strategy: Any) -> bool:
    """Return whether a strategy reads checkpoints itself, memory-mapped or shard by shard.

    Args:
        strategy: A registered name, or the path of a class.
    """
    return isinstance(strategy, str) and strategy.rpartition(".")[2] == ModelParallelStrategy.__name__


def fill_data_parallel_size(trainer: Trainer) -> None:
    """Set ``data_parallel_size: auto`` to the number of processes on all nodes over ``tensor_parallel_size``.

    Lightning sets it to the number of nodes, which fails wherever a node has more than one process and
    ``tensor_parallel_size`` is a number.

    Args:
        trainer: Changed in place, before it runs.

    Raises:
        ValueError: If the number of processes is not divisible.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    size, processes = strategy._tensor_parallel_size, strategy.num_processes * trainer.num_nodes
    if strategy._data_parallel_size == "auto" and isinstance(size, int):
        if processes % size:
            refuse(
                "trainer.strategy",
                f"tensor_parallel_size ({size}) must divide the number of processes ({processes}); change devices.",
            )
        strategy._data_parallel_size = processes // size


def check_trainer(trainer: Trainer) -> None:
    """Reject trainer options that would fail late or go wrong silently, and have checkpoints checked before a load.

    Args:
        trainer: Before it runs.

    Raises:
        ValueError: If its options are not supported together.
    """
    check_numbers({name: getattr(trainer, name) for name in ("gradient_clip_val", "accumulate_grad_batches")})
    strategy = trainer.strategy
    _check_before_loading(strategy)
    if isinstance(strategy, FSDPStrategy):
        refuse("trainer.strategy", FSDP1)
    if str(trainer.precision) == "16-true":
        refuse(
            "trainer.precision",
            "16-true keeps weights and optimizer state in float16, where small gradients are zero; take bf16-mixed or "
            "bf16-true, or 16-mixed where the GPU has no bfloat16.",
        )
    if isinstance(strategy, DDPStrategy):
        _check_ddp(trainer, strategy)
    if isinstance(strategy, ModelParallelStrategy):
        _check_model_parallel(trainer, strategy)


def check_accumulation(trainer: Trainer) -> None:
    """Reject two settings of how many batches are accumulated.

    Args:
        trainer: About to fit.

    Raises:
        ValueError: If ``accumulate_grad_batches`` is given beside a ``GradientAccumulationScheduler``.
    """
    scheduler = accumulation_scheduler(trainer)
    if scheduler is not None and trainer.accumulate_grad_batches > 1:
        refuse(
            "trainer.accumulate_grad_batches",
            f"is {trainer.accumulate_grad_batches}, but GradientAccumulationScheduler sets it to "
            f"{scheduler.scheduling[0]} in the first epoch; leave one of them out.",
        )


def _check_ddp(trainer: Trainer, strategy: DDPStrategy) -> None:
    if strategy._ddp_kwargs.get("static_graph") and most_accumulated(trainer) > 1:
        refuse(
            "trainer.strategy",
            "DDPStrategy with static_graph: true does not go with accumulate_grad_batches="
            f"{most_accumulated(trainer)}: torch fails in the first step; leave static_graph out.",
        )


def _check_model_parallel(trainer: Trainer, strategy: ModelParallelStrategy) -> None:
    if trainer.predict_loop.inference_mode:
        refuse(
            "trainer.inference_mode",
            "must be false with ModelParallelStrategy: FSDP2 gathers weights in place, which inference mode forbids.",
        )


def _check_before_loading(strategy: Strategy) -> None:
    """Let a strategy load checkpoints only after a check, and only tensors and plain values of them.

    Every way to a checkpoint ends there: a path, ``best``, ``last``, ``hpc``, a requeued job; whichever
    :class:`~lightning.pytorch.plugins.CheckpointIO` the strategy has, or none.

    Args:
        strategy: Changed in place, once.
    """
    if "load_checkpoint" not in vars(strategy):
        checked = functools.partial(_load_checked, strategy, strategy.load_checkpoint)
        strategy.load_checkpoint = checked  # type: ignore[method-assign]


def _load_checked(
    strategy: Strategy, load: Callable[..., dict[str, Any]], checkpoint_path: Any, weights_only: Any = None
) -> Any:
    path = Path(checkpoint_path)
    itself = isinstance(strategy, ModelParallelStrategy)  # without a CheckpointIO
    if path.exists() and (itself or not isinstance(strategy.checkpoint_io, AtomicCheckpointIO)):
        check_files(path)
    with only_weights():
        return load(checkpoint_path, weights_only=True)


def check_compilation(trainer: Trainer, activation_checkpointing: str | None, *, compiled: bool) -> None:
    """Reject options that torch's compiler does not support under tensor parallelism.

    Args:
        trainer: Set up, so that its strategy has a device mesh.
        activation_checkpointing: How blocks are recomputed.
        compiled: Whether they are compiled.

    Raises:
        ValueError: If whole blocks are recomputed and compiled under tensor parallelism.
    """
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if compiled and activation_checkpointing == "full" and mesh is not None and mesh["tensor_parallel"].size() > 1:
        refuse(
            "activation_checkpointing",
            "full does not go with compile_blocks under tensor parallelism: torch's compiler fails in the first step; "
            "take selective, or leave compile_blocks out.",
        )


def check_gradients(trainer: Trainer, module: nn.Module) -> None:
    """Reject parameters without a gradient, which DDP waits for and reports only one step later.

    Args:
        trainer: Of the run.
        module: What is trained, after its first backward pass.

    Raises:
        ValueError: If the strategy is DDP without ``find_unused_parameters``, and there are such parameters.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters"):
        return
    unused = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    if unused:
        refuse(
            "trainer.strategy",
            f"DDP waits for gradients that {unused[0]} and {len(unused) - 1} other parameters never get; leave them "
            "out of the model, freeze them, or take ddp_find_unused_parameters_true.",
        )
