"""The command line on one process of two."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mtp_modules.training import MTPModule
from tests.command_line import run


def fit(arguments: list[str | Path]) -> dict[str, Any]:
    """Train, and return what the model was like before the first step, and that it was still so at the end."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # a run that goes on elsewhere
    found: dict[str, Any] = {}
    configure, start, end = MTPModule.configure_model, MTPModule.on_fit_start, MTPModule.on_fit_end

    def before(self: MTPModule) -> None:
        found.setdefault("built on", {parameter.device.type for parameter in self.parameters()})
        configure(self)

    def at_start(self: MTPModule) -> None:
        found["sharded"] = all(isinstance(parameter, DTensor) for parameter in self.parameters())
        found["policy"] = self.sharding and self.sharding.param_dtype
        start(self)

    def at_end(self: MTPModule) -> None:
        found["steps"] = self.trainer.global_step
        end(self)

    MTPModule.configure_model, MTPModule.on_fit_start, MTPModule.on_fit_end = before, at_start, at_end
    run(*arguments)
    return found


def resume(arguments: list[str | Path]) -> tuple[int, list[bool]]:
    """Train, and return the last step, and of each reading of ``last.ckpt`` whether it left the tensors on disk."""
    mapped, load = [], torch.load

    def noted(file: Any, *more: Any, **options: Any) -> Any:
        if Path(str(getattr(file, "name", file))).name == "last.ckpt":
            mapped.append(bool(options.get("mmap")))
        return load(file, *more, **options)

    torch.load = noted
    return fit(arguments)["steps"], mapped
