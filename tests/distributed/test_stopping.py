"""Runs on two processes end with the same bits whether they are stopped or not, whatever is random in them."""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run, data, module, trainer
from tests.distributed.stopping import change, fail_to_save, stop_and_go, train_from_last


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


def test_all_processes_end_when_one_cannot_save(tmp_path: Path) -> None:
    first, second = run_ranks(fail_to_save, tmp_path, timeout=120)
    assert first == second
    assert {kind: step for kind, (_, step) in first.items()} == {"ddp": 2, "fsdp2": 2, "shards": 2, "no permission": 0}
    for kind in ("ddp", "fsdp2", "shards"):
        start = f"saving: {tmp_path / kind / 'last.ckpt'} could not be written ("
        assert first[kind][0].startswith(start), first[kind][0]
        assert "; what was there is unchanged. Free some space, or " in first[kind][0]
    assert first["no permission"][0].startswith(
        f"checkpoints: {tmp_path / 'no permission'} cannot be written to (Permission denied)."
    )


@pytest.mark.parametrize(
    ("world_size", "workers"),
    [(1, 2), (2, 0), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_killed_twice_a_run_ends_with_the_same_bits(tmp_path: Path, world_size: int, workers: int) -> None:
    for step in (3, 6):
        with pytest.raises(AssertionError, match=f"rank {world_size - 1}: it died with exit code -9"):
            run_ranks(train_from_last, tmp_path, world_size, workers, step, world_size=world_size, timeout=120)
    found = {
        value
        for folder in (tmp_path, tmp_path / "whole")
        for value in run_ranks(train_from_last, folder, world_size, workers, None, world_size=world_size, timeout=120)
    }
    assert len(found) == 1
