"""Runs on two processes end with the same bits whether they are stopped or not, whatever is random in them."""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run, data, module, trainer
from tests.distributed.stopping import change, stop_and_go


@pytest.mark.parametrize(
    "name", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "ddp with muon"))]
)
def test_stopped_twice_on_two_processes(tmp_path: Path, name: str) -> None:
    first, second = run_ranks(stop_and_go, tmp_path, name, timeout=120)
    assert len(set(first.values()) | set(second.values())) == 1
    if name == "ddp":
        states = torch.load(tmp_path / "ddp file 5.ckpt", weights_only=True)["mtp_modules"]["random_states"]["cpu"]
        assert len(states) == 2
        assert not torch.equal(states[0], states[1])
        run = Run(optimizer="adamw", distillation=0.0)  # one process goes on from two
        trainer(run, 1, tmp_path, max_steps=9).fit(module(run), data(run, 1), ckpt_path=tmp_path / "ddp file 5.ckpt")


def test_a_sharded_run_takes_its_present_settings(tmp_path: Path) -> None:
    first, _ = run_ranks(change, tmp_path, timeout=120)
    assert (first["rates"], first["decay"]) == ([0.3, 0.01], [0.0, 0.0])
    assert first["said"] == [
        "Resumed with other settings than the checkpoint was trained with: max_steps 2 -> 5; optimizer lr 0.02 -> 0.3; "
        "optimizer weight_decay 0.1 -> 0.0."
    ]
    assert first["class"].startswith(
        "ckpt_path: the optimizer is AdamW here, but the checkpoint holds the state of Muon"
    )
    assert first["frozen"].startswith(
        "ckpt_path: trunk is frozen here, but was not in the run of the checkpoint, which"
    )
