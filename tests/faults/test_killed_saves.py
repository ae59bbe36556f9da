"""SIGKILL while a checkpoint is saved, with ``$TMPDIR`` on another file system."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as sharded

from mtp_modules.core.checksums import damaged_file, damaged_record
from mtp_modules.core.saving import remove_partial, save_checkpoint
from tests.faults.processes import killed_midway, started, times
from tests.faults.saving import SIZE, content, elsewhere, save_files, save_folders


def read_file(path: Path) -> list[Tensor]:
    """Return the tensors of a checkpoint, all of which must be whole."""
    assert damaged_record(path) is None
    found = torch.load(path, weights_only=True)
    return [found["first"], found["second"], torch.tensor([float(found["step"])])]


def read_folder(path: Path) -> list[Tensor]:
    """The same, of shards."""
    assert damaged_file(path) is None
    found = {"first": torch.zeros(SIZE), "second": torch.zeros(SIZE)}
    sharded.load(found, checkpoint_id=path, no_dist=True)
    return list(found.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("layout", ["file", "shards"])
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, layout: str) -> None:
    save, read = {"file": (save_files, read_file), "shards": (save_folders, read_folder)}[layout]
    path, dice, steps = tmp_path / "last.ckpt", random.Random(0), []
    other = elsewhere(path)
    other.mkdir()
    for _ in range(times(20, 100)):
        killed_midway(save, path, path, 0.15 * dice.random())
        tensors = read(path)
        (value,) = {float(value) for tensor in tensors for value in tensor.unique()}
        steps.append(value)
    assert len(set(steps)) > 1  # some were replaced before the kill
    left = os.listdir(other)
    shutil.rmtree(other)
    assert left == []
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for _ in range(50):
        process = started(save_files, path)
        time.sleep(0.1)
        process.kill()
        process.join()
        if any(name.endswith(".partial") for name in os.listdir(tmp_path)):
            break
    save_checkpoint(content(1), path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
