"""One flipped bit in a checkpoint: it never loads with other weights."""

import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as sharded

from mtp_modules.core.checks import InputError
from mtp_modules.core.checksums import damaged_record
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


def test_a_flipped_bit_in_the_lists_of_records_is_refused(saved: Path, tmp_path: Path) -> None:
    """Where they are, how long their names are, whether they are folders or encrypted: no tensor has these bits."""
    with zipfile.ZipFile(saved) as archive:
        starts = [(record.header_offset, 30 + len(record.filename)) for record in archive.infolist()]
        places = [*range(archive.start_dir, saved.stat().st_size)]
    places += [place for start, length in starts for place in range(start, start + length)]
    dice, content, damaged = random.Random(2), saved.read_bytes(), tmp_path / "damaged.ckpt"
    for place in dice.sample(places, times(100, 2000)):
        changed = bytearray(content)
        changed[place] ^= 1 << dice.randrange(8)
        damaged.write_bytes(changed)
        with pytest.raises(InputError, match=r"^ckpt_path: \S+ [^\n]+\.$"):
            read_checkpoint(damaged)


def test_a_file_of_torch_itself_is_checked_record_by_record(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save({"weight": torch.arange(5000.0)}, path)
    assert damaged_record(path) is None
    content = bytearray(path.read_bytes())
    place = content.find(torch.arange(5000.0).numpy().tobytes()[-16:])
    content[place] ^= 1
    path.write_bytes(content)
    assert damaged_record(path) == "plain/data/0"


def test_a_flipped_bit_is_refused_wherever_it_is(saved: Path, tmp_path: Path) -> None:
    dice, damaged = random.Random(1), tmp_path / "damaged" / "last.ckpt"
    damaged.parent.mkdir()
    for _ in range(times(60, 400)):
        shutil.copyfile(saved, damaged)
        flipped(damaged, dice)
        with pytest.raises(InputError, match=r"^ckpt_path: \S+ [^\n]+\.$"):
            read_checkpoint(damaged)


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
