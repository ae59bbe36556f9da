"""The loops of a page of the documentation, each in a process of its own or in several."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from tests.architecture.imports import ROOT

_BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/your_loop.md").read_text(encoding="utf-8"), re.M | re.S)
CODE = {"plain": _BLOCKS[:1], "nanogpt": _BLOCKS[1:3], "trainer": _BLOCKS[3:4], "accelerate": _BLOCKS[4:]}
"""The code of each section."""


def names_of(section: str, folder: Path | None = None, monkeypatch: pytest.MonkeyPatch | None = None) -> dict[str, Any]:
    """Run the code of a section, as a module that can be imported if there is a folder, and return what it defines."""
    torch.manual_seed(0)
    module = ModuleType(section)
    if monkeypatch is not None:
        monkeypatch.setitem(sys.modules, section, module)
    exec(compile("\n".join(CODE[section]), f"your_loop.md, {section}", "exec"), module.__dict__)
    return module.__dict__


def accelerated(accumulate: int) -> dict[str, Tensor]:
    """Train by accelerate on the processes of the group, or on this one; return the weights, and one of them before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    world_size = 1
    if dist.is_initialized():
        world_size = dist.get_world_size()
        os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(world_size)}
    AcceleratorState._reset_state(reset_partial_state=True)

    plain = names_of("plain")
    torch.manual_seed(0)
    model = plain["make_model"]()
    before = model.trunk.embedding.weight.detach().clone()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    trained = names_of("accelerate")["fit"](
        accelerator, model, plain["make_rows"](16), batch_size=2, accumulate=accumulate
    )
    return {"before": before, **{name: value.detach() for name, value in trained.state_dict().items()}}
