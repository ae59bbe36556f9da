"""A run continues exactly where its checkpoint was saved, under the settings that it is configured with now."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component, describe
from mtp_modules.data.counts import CountsAhead
from mtp_modules.data.resumable import ResumableLoader
from mtp_modules.loading import CHECKPOINT_KEY
from mtp_modules.training.checkpointing import in_model_order
from mtp_modules.training.descriptions import differences, own_description
from mtp_modules.training.learning_rates import scaled_optimizer
from mtp_modules.training.optimizer_states import (
    carry_over,
    check_sharded_optimizers,
    group_changes,
    record_optimizers,
    restart_schedules,
    set_rates,
)
from mtp_modules.training.random_states import gather_random_states, restore_random_states


def record_run(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint what an exact continuation needs beside Lightning's own; every process must call.

    Args:
        module: Attached to its trainer.
        checkpoint: As Lightning makes it, with the package's own part; changed in place.
    """
    trainer, own = module.trainer, checkpoint[CHECKPOINT_KEY]
    if "optimizer_states" in checkpoint:
        own["settings"] = settings_of(module, trainer)
        own |= record_optimizers(module, trainer.optimizers)
        if module.device_mesh is None:
            pairs = zip(checkpoint["optimizer_states"], trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [in_model_order(state, optimizer, module) for state, optimizer in pairs]
    own["random_states"] = gather_random_states(trainer, module.device)


def settings_of(module: Any, trainer: Trainer) -> dict[str, Any]:
    """Return as plain values the settings of a run that a resumed run may change.

    Args:
        module: With its loss, schedule, teacher and frozen parts.
        trainer: Of the run.
    """
    data = getattr(trainer, "datamodule", None)
    return {
        "loss": describe(module.loss),
        "lr_schedule": _described(module.lr_schedule),
        "teacher": _described(module.teacher),
        "freeze": list(module.frozen),
        "lr_scales": dict(module.lr_scales),
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": None if trainer.gradient_clip_val is None else _clipping(trainer),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "batch_size": getattr(data, "batch_size", None),
        "data_seed": getattr(data, "seed", None),
        "augmentation": _described(getattr(data, "augmentation", None)),
    }


def _clipping(trainer: Trainer) -> str:
    return str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) or "norm")


def _described(part: Any) -> Any:
    return describe(part) if isinstance(part, Component) else None


def check_resumable(
    checkpoint: Mapping[str, Any], *, sharded: bool = False, loops: Mapping[str, Any] | None = None
) -> None:
    """Raise an error for a checkpoint that holds weights alone, or whose state of the training is not complete.

    Args:
        checkpoint: As it was read.
        sharded: Whether it is a folder of shards, which has the states of optimizers elsewhere.
        loops: State of the loop that will continue; its names must be in the checkpoint.

    Raises:
        ValueError: If the state of the loops, an optimizer or a scheduler is missing.
    """
    needed = ("loops", "lr_schedulers", *(() if sharded else ("optimizer_states",)))
    if any(name not in checkpoint for name in needed):
        refuse(
            "ckpt_path",
            "the checkpoint holds weights without the state of their training; start a new run from them with "
            "--init_from (mtp_modules.training.init_from in a script).",
        )
    saved, step = checkpoint["loops"], checkpoint.get("global_step")
    loop = saved.get("fit_loop") if isinstance(saved, Mapping) else None
    wrong = {
        "loops": not isinstance(loop, Mapping) or not (loops or {}).keys() <= loop.keys(),
        "lr_schedulers": not _are_mappings(checkpoint["lr_schedulers"]),
        "optimizer_states": not sharded and not _are_optimizers(checkpoint["optimizer_states"]),
        "global_step": not isinstance(step, int) or step < 0,
        "epoch": not isinstance(checkpoint.get("epoch"), int),
        "pytorch-lightning_version": not isinstance(checkpoint.get("pytorch-lightning_version"), str),
    }
    if incomplete := [name for name, is_wrong in wrong.items() if is_wrong]:
        refuse(
            "ckpt_path",
            f"the checkpoint's {', '.join(incomplete)} cannot be continued from: missing, or not as a run saves it; "
            "start a new run from its weights with --init_from.",
        )


def _are_mappings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, Mapping) for value in values)


def _are_optimizers(values: Any) -> bool:
    return _are_mappings(values) and bool(values) and all({"state", "param_groups"} <= value.keys() for value in values)


def check_configured_optimizer(module: Any, own: Mapping[str, Any]) -> None:
    """Raise an error before a run whose strategy could not load the optimizer state of its checkpoint.

    Args:
        module: As configured, not sharded yet.
        own: What the checkpoint says of itself.

    Raises:
        ValueError: See :func:`~mtp_modules.training.optimizer_states.check_sharded_optimizers`.
    """
    optimizer = scaled_optimizer(module.optimizer, module.model, module.lr_scales, module.objectives)
    check_sharded_optimizers(own, module, [optimizer])


class Resumption:
    """What a module keeps of a checkpoint from when Lightning loads it to the first batch.

    Lightning loads weights, then makes optimizers, then restores their states. ``ModelParallelStrategy`` makes
    optimizers first and loads everything at once.
    """

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None
        self._options: list[list[dict[str, Any]]] = []

    def load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prepare for weights and, in a fit, for the rest.

        Args:
            module: Attached to its trainer.
            checkpoint: As Lightning loads it.

        Raises:
            ValueError: If a fit cannot continue from it.
        """
        module.trainer.precision_plugin.convert_module(module)  # else Lightning loads float64 weights as float32
        if module.trainer.state.fn != "fit":
            return
        self._checkpoint = checkpoint
        if module.device_mesh is None:
            check_resumable(checkpoint, loops=module.trainer.fit_loop.state_dict())
        else:
            _adapt(module, checkpoint, self._options)

    def begin(self, module: LightningModule) -> None:
        """Let the optimizers that were just made continue under the present settings.

        Args:
            module: Attached to its trainer.
        """
        self._options = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in module.trainer.optimizers
        ]
        if self._checkpoint is not None:
            _adapt(module, self._checkpoint, self._options)

    def finish(self, module: LightningModule) -> None:
        """Restore what must be restored last, right before the first batch.

        Args:
            module: Attached to its trainer.
        """
        if self._checkpoint is not None:
            _restore(module, self._checkpoint)
        self._checkpoint, self._options = None, []
        _follow_training(module.trainer)


def _adapt(module: Any, checkpoint: dict[str, Any], options: list[list[dict[str, Any]]]) -> None:
    """Let a run continue under its present settings, and say in one line which of them the checkpoint does not have.

    Called when weights are loaded and optimizers are made, before Lightning restores optimizers and schedulers, whose
    states are changed in place.
    """
    trainer: Trainer = module.trainer
    own = own_description(checkpoint)
    before = checkpoint["lr_schedulers"]
    schedules = restart_schedules(trainer.lr_scheduler_configs, before, int(checkpoint["global_step"]))
    checkpoint["lr_schedulers"] = schedules
    changes = _changed_settings(own.get("settings"), settings_of(module, trainer))
    if module.device_mesh is None:
        states = []
        for place, (state, optimizer) in enumerate(
            zip(checkpoint["optimizer_states"], trainer.optimizers, strict=True)
        ):
            carried, found = carry_over(state, own, optimizer, module, place=place)
            set_rates(carried["param_groups"], schedules)
            states.append(carried)
            changes += found
        checkpoint["optimizer_states"] = states
    else:  # the strategy has loaded weights, states and settings already
        check_sharded_optimizers(own, module, trainer.optimizers)
        for optimizer, groups in zip(trainer.optimizers, options, strict=True):
            for group, configured in zip(optimizer.param_groups, groups, strict=True):
                changes += group_changes(group, configured)
                group.update(configured)
            set_rates(optimizer.param_groups, schedules)
    changes = list(dict.fromkeys(changes))
    if changes:
        rank_zero_info(f"Resumed with other settings than the checkpoint was trained with: {'; '.join(changes)}.")


def _changed_settings(saved: Any, now: Mapping[str, Any]) -> list[str]:
    """Return the differing settings in words."""
    found = []
    for name in now:
        if isinstance(saved, Mapping) and name in saved:
            found += [f"{d.name} {d.saved} -> {d.here}" for d in differences(now[name], saved[name], name)]
    return found


def _restore(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Restore random states, and positions of loaders."""
    trainer = module.trainer
    restore_random_states(trainer, module.device, own_description(checkpoint).get("random_states", {}))
    _finish_epoch(trainer)
    loop, states = trainer.fit_loop, checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader")
    if states and loop.restarting and loop._combined_loader is not None and loop._data_fetcher is not None:
        # A schedule asks for the loaders before their states are there, and Lightning does not come back to them; and a
        # loader without a length has been read already, with another random state.
        loop._combined_loader._load_state_dicts(states)
        iter(loop._data_fetcher)


def _finish_epoch(trainer: Trainer) -> None:
    """Begin the next epoch where the checkpoint was saved after the last batch of a loader without a length.

    Lightning does so where it knows the number of batches, and otherwise continues to count from the last one, which
    moves the ends of accumulated steps.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.num_training_batches == float("inf") and loop.restarted_on_train_batch_end:
        progress = loop.batch_progress
        if progress.is_last_batch:
            progress.increment_completed()
            for counted in (progress, loop.scheduler_progress, loop.automatic_optimization.optim_progress):
                counted.reset_on_run()
            loop.val_loop.batch_progress.total.reset()
            loop.reset_restart_stage()


def _follow_training(trainer: Trainer) -> None:
    """Tell loaders that read ahead which batches have been trained on."""
    loader = trainer.fit_loop._combined_loader
    for part in [] if loader is None else loader.flattened:
        if isinstance(part, CountsAhead | ResumableLoader):
            part.follow(
                lambda: _processed(trainer),
                limit=trainer.num_training_batches,
            )


def _processed(trainer: Trainer) -> int:
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)
