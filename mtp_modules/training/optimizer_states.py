"""Optimizer states by the names of parameters, so that a resumed run may change anything about its optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtp_modules.core.checks import refuse
from mtp_modules.training.freezing import FREEZABLE
from mtp_modules.training.learning_rates import SCALE
from mtp_modules.training.optimizers import MuonWithAdamW

_BASE_RATE = "initial_lr"
"""Torch's key of a group's learning rate before its schedule."""

_ALGORITHM = "use_muon"
"""Key of a group that decides which state a parameter has (:class:`MuonWithAdamW`)."""

_NO_SETTING = ("params", "param_names", "lr", _BASE_RATE, SCALE, _ALGORITHM)


def record_optimizers(module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return whose states a checkpoint holds: all parameters in order, and the class and parameters of each optimizer.

    Args:
        module: That is trained.
        optimizers: Of the run.
    """
    names = names_of(module)
    trained = [[names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    return {
        "parameters": list(names.values()),
        "optimizers": [
            {"class_path": _class_path(optimizer), "trained": mine}
            for optimizer, mine in zip(optimizers, trained, strict=True)
        ],
    }


def names_of(module: nn.Module) -> dict[int, str]:
    """Return the name of every parameter by its identity, in the order of ``module.parameters()``.

    Args:
        module: The module; a shared parameter has one name.
    """
    return {id(parameter): name for name, parameter in module.named_parameters()}


class _Saved(NamedTuple):
    """An optimizer's state in a checkpoint: class, and by name of the parameter its state and settings."""

    class_path: str
    states: dict[str, Any]
    settings: dict[str, dict[str, Any]]


def _by_name(state: Mapping[str, Any], names: Sequence[str], class_path: str) -> _Saved:
    settings = {names[number]: group for group in state["param_groups"] for number in group["params"]}
    return _Saved(class_path, {names[number]: value for number, value in state["state"].items()}, settings)


def carry_over(
    state: Mapping[str, Any], recorded: Mapping[str, Any], optimizer: Optimizer, module: nn.Module, *, place: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """Return what an optimizer loads: the saved state of each of its parameters, under its own settings.

    A parameter has no saved state if it was frozen, or if another algorithm updated it; its state starts anew.

    Args:
        state: The optimizer's state in the checkpoint, numbered in the order of the module.
        recorded: Result of :func:`record_optimizers` in the checkpoint; may be empty.
        optimizer: As configured.
        module: That it trains.
        place: Which optimizer of the run it is.

    Returns:
        A state for ``optimizer.load_state_dict``, and what changed, in words.
    """
    names = names_of(module)
    kinds = recorded.get("optimizers", [])
    class_path = str(kinds[place]["class_path"]) if place < len(kinds) else _class_path(optimizer)
    saved = _by_name(state, recorded.get("parameters", list(names.values())), class_path)
    same = saved.class_path == _class_path(optimizer)
    present = optimizer.state_dict()
    kept, anew = {}, []
    for group, numbered in zip(optimizer.param_groups, present["param_groups"], strict=True):
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            name = names[id(parameter)]
            before = saved.settings.get(name)
            alike = not isinstance(optimizer, MuonWithAdamW) or (before or {}).get(_ALGORITHM) == group[_ALGORITHM]
            if not same or before is None or not alike:
                anew.append(name)
            elif name in saved.states:
                kept[number] = saved.states[name]
    changes = [] if same else [f"optimizer {saved.class_path.rpartition('.')[2]} -> {type(optimizer).__name__}"]
    if same:
        changes += _changed_settings(saved.settings, optimizer, names)
    if anew:
        changes.append(f"the optimizer state of {', '.join(_parts(anew))} starts anew")
    return {"state": kept, "param_groups": present["param_groups"]}, changes


def _changed_settings(
    saved: Mapping[str, Mapping[str, Any]], optimizer: Optimizer, names: Mapping[int, str]
) -> list[str]:
    """Return the settings whose values differ, each change once."""
    found: dict[str, None] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            before = saved.get(names[id(parameter)])
            if before is not None:
                found |= dict.fromkeys(group_changes(before, group))
    return list(found)


def group_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words which settings of a parameter group differ.

    Args:
        before: The group in a checkpoint.
        now: As configured.
    """
    rates = [group.get(_BASE_RATE, group.get("lr")) for group in (before, now)]
    changes = [] if rates[0] == rates[1] else [f"optimizer lr {rates[0]} -> {rates[1]}"]
    for name, value in now.items():
        if name not in _NO_SETTING and name in before:
            old = tuple(before[name]) if isinstance(before[name], list) else before[name]
            if old != (tuple(value) if isinstance(value, list) else value):
                changes.append(f"optimizer {name} {old} -> {value}")
    return changes


def _parts(names: Sequence[str]) -> list[str]:
    """Return the parts of the model that parameters belong to."""
    found = {name.removeprefix("model.").partition(".")[0] for name in names}
    return sorted(found, key=lambda part: (*FREEZABLE, part).index(part))


def _class_path(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def restart_schedules(configs: Sequence[Any], saved: Sequence[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Return the states of schedulers as configured, at the step of a checkpoint.

    A factor that is a closed form of the step (:class:`~mtp_modules.training.LearningRateSchedule`) needs nothing else.
    A scheduler of another kind takes the state that the checkpoint holds for it.

    Args:
        configs: Lightning's configuration of each scheduler.
        saved: Their states in the checkpoint.
        steps: Optimizer steps taken.
    """
    states = []
    for place, config in enumerate(configs):
        scheduler, before = config.scheduler, saved[place] if place < len(saved) else {}
        if not isinstance(scheduler, LambdaLR):
            states.append(before or scheduler.state_dict())
            continue
        step = int(before.get("last_epoch", steps))
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        at_step = {"last_epoch": step, "_step_count": before.get("_step_count", step + 1), "_last_lr": rates}
        states.append({**scheduler.state_dict(), **at_step})
    return states


def set_rates(groups: Sequence[dict[str, Any]], schedules: Sequence[dict[str, Any]]) -> None:
    """Set the learning rates of parameter groups to those of their scheduler.

    Args:
        groups: Of the optimizer, or of its state; changed in place.
        schedules: States of the run's schedulers, at most one of which has rates for these groups.
    """
    for schedule in schedules:
        for group, rate in zip(groups, schedule.get("_last_lr", ()), strict=False):
            group["lr"] = rate


def check_sharded_optimizers(recorded: Mapping[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise an error for another optimizer or other trained parameters where the strategy loads optimizers itself.

    Args:
        recorded: Result of :func:`record_optimizers` in the checkpoint; nothing is checked without it.
        module: That is trained.
        optimizers: As configured.

    Raises:
        ValueError: If the class of an optimizer differs, or the set of trained parameters.
    """
    now = record_optimizers(module, optimizers)["optimizers"]
    for mine, saved in zip(now, recorded.get("optimizers", []), strict=False):
        kinds = [str(kind["class_path"]).rpartition(".")[2] for kind in (mine, saved)]
        if mine["class_path"] != saved["class_path"]:
            what = f"the optimizer is {kinds[0]} here, but the checkpoint holds the state of {kinds[1]}"
        elif moved := set(mine["trained"]) ^ set(saved["trained"]):
            here = "trained" if moved & set(mine["trained"]) else "frozen"
            what = f"{', '.join(_parts(sorted(moved)))} is {here} here, but was not in the run of the checkpoint"
        else:
            continue
        refuse(
            "ckpt_path",
            f"{what}, which ModelParallelStrategy cannot load; resume with what the checkpoint was trained with, or "
            "start from its weights alone with --init_from.",
        )
