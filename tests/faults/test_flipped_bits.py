"""One flipped bit in a checkpoint: it never loads with other weights."""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as sharded

from mtp_modules.core.saving import finish_folder
from mtp_modules.loading import read_checkpoint
from tests.faults.processes import times
from tests.unit.training.running import SaveAt, data, module, trainer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the checkpoint of a run."""
    path = tmp_path / "run" / "last.ckpt"
    trainer(tmp_path, SaveAt(path, 2), max_steps=2, max_epochs=-1).fit(module(), data())
    return path


def flipped(path: Path, dice: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def test_a_flipped_bit_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    dice, damaged, refused = random.Random(1), tmp_path / "damaged" / "last.ckpt", 0
    damaged.parent.mkdir()
    whole = read_checkpoint(saved)
    for _ in range(times(60, 400)):
        shutil.copyfile(saved, damaged)
        flipped(damaged, dice)
        try:
            found = read_checkpoint(damaged)
        except ValueError as error:
            assert re.fullmatch(r"ckpt_path: \S+ [^\n]+\.", str(error))  # noqa: PT017
            refused += 1
        else:  # it lies between the records
            assert found["state_dict"].keys() == whole["state_dict"].keys()
            assert all(torch.equal(found["state_dict"][name], value) for name, value in whole["state_dict"].items())
            for (_, state), (_, other) in zip(
                found["optimizer_states"][0]["state"].items(),
                whole["optimizer_states"][0]["state"].items(),
                strict=True,
            ):
                assert all(torch.equal(state[name], other[name]) for name in other)
    assert refused > times(30, 200)


def test_a_damaged_checkpoint_names_the_newest_good_one(saved: Path) -> None:
    best, last = saved.with_name("best.ckpt"), saved
    shutil.copyfile(last, best)
    content = bytearray(last.read_bytes())
    at = content.index(read_checkpoint(best)["state_dict"]["model.trunk.embedding.weight"].numpy().tobytes()[:64])
    content[at] ^= 1
    last.write_bytes(content)
    expected = rf"{last} is damaged: archive/data/\d+ is not what was saved; the newest one that is whole is {best}\.$"
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(last)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_flipped_bit_in_any_file_of_a_sharded_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    whole, folder, partial = read_checkpoint(saved), tmp_path / "sharded.ckpt", tmp_path / ".sharded.partial"
    sharded.save({"state_dict": whole.pop("state_dict")}, checkpoint_id=partial, no_dist=True)
    torch.save(whole, partial / "meta.pt")
    finish_folder(partial, folder)
    assert read_checkpoint(folder)["global_step"] == 2
    dice, names = random.Random(2), sorted(file.name for file in folder.iterdir())
    for name in names * times(3, 30):
        kept = (folder / name).read_bytes()
        flipped(folder / name, dice)
        with pytest.raises(ValueError, match=r"is damaged|was not written by this package"):
            read_checkpoint(folder)
        (folder / name).write_bytes(kept)
    (folder / names[-1]).unlink()
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(folder)
