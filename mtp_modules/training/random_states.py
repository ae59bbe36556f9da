"""The random states of all processes of a run, kept in its checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from mtp_modules.core.shapes import Tensor


def generators_of(device: torch.device) -> dict[str, torch.Generator]:
    """Return the default generators that a run on a device uses, by the type of their device.

    Args:
        device: Of the model.
    """
    found = {"cpu": torch.default_generator}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.default_generators[device.index or 0]
    return found


def gather_random_states(trainer: Trainer, device: torch.device) -> dict[str, Tensor]:
    """Return the random states of all processes, one row each; every process must call.

    Args:
        trainer: Of the run.
        device: Of the model in this process.
    """
    states = {}
    for name, generator in generators_of(device).items():
        state = generator.get_state()
        if trainer.world_size == 1:
            states[name] = state[None]
        else:
            mine = state.to(trainer.strategy.root_device)
            every = [torch.empty_like(mine) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(every, mine)
            states[name] = torch.stack(every).cpu()
    return states


def restore_random_states(trainer: Trainer, device: torch.device, saved: Mapping[str, Any]) -> None:
    """Set the random state of this process to the one it had when the checkpoint was saved.

    With another number of processes there is no such state: then process ``r`` takes that of process ``r`` modulo the
    saved number, and one line says so.

    Args:
        trainer: Of the run.
        device: Of the model in this process.
        saved: Result of :func:`gather_random_states`.
    """
    processes = trainer.world_size
    for name, generator in generators_of(device).items():
        rows = saved.get(name)
        if rows is None:
            rank_zero_info(f"Resumed without a random state of {name}, which the checkpoint does not hold.")
        else:
            generator.set_state(
                rows[trainer.global_rank % len(rows)].cpu().clone()
            )  # torch ignores where a view begins
            processes = len(rows)
    if processes != trainer.world_size:
        rank_zero_info(
            f"Resumed on {trainer.world_size} processes from a checkpoint of {processes}: the data goes on where it "
            "was, but random numbers (dropout, sampled positions) are not those of an uninterrupted run."
        )
