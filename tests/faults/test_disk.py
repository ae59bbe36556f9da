"""Folders that cannot be written to, and disks that are full."""

import shutil
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from mtp_modules.core import saving
from mtp_modules.core.saving import atomic_file, check_folder, save_checkpoint, write_text
from tests.faults.processes import SMALL, Command, give_up_capabilities, started
from tests.unit.training.running import data, module, trainer

FIT = ("fit", *SMALL, "--trainer.max_epochs=3")


def test_a_folder_without_permission_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    command = Command(tmp_path, *FIT, ordinary=True)
    assert command.status() == 1
    assert "error: trainer.logger: the run's folder runs/notebook cannot be written to (Permission denied)" in (
        command.output()
    )
    assert not command.mark.exists()
    assert not list((tmp_path / "runs").iterdir())


def test_a_folder_that_turns_read_only_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    command = Command(tmp_path, *FIT, "--trainer.max_epochs=50", at=5, slow=0.3, ordinary=True)
    command.wait_for_mark()
    (checkpoints,) = tmp_path.rglob("checkpoints")
    before = {file.name: file.read_bytes() for file in checkpoints.iterdir()}
    checkpoints.chmod(0o555)
    status = command.status()
    checkpoints.chmod(0o755)
    assert status == 1
    assert "could not be written (Permission denied); what was there is unchanged" in command.output()
    assert "Checkpoint:" not in command.output()
    assert {file.name: file.read_bytes() for file in checkpoints.iterdir()} == before
    assert set(before) == {"best.ckpt", "last.ckpt"}


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    first = Command(tmp_path, *FIT)
    assert first.status() == 0, first.output()
    (best,) = tmp_path.rglob("best.ckpt")
    before, size = best.read_bytes(), best.stat().st_size
    second = Command(tmp_path, *FIT, f"--ckpt_path={best}", "--trainer.max_epochs=9", file_limit=size // 2)
    assert second.status() == 1
    assert "could not be written (File too large); what was there is unchanged. Free some space" in second.output()
    assert best.read_bytes() == before
    assert "Checkpoint:" not in second.output()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_disk_with_less_space_than_a_checkpoint_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(ValueError, match=r"has 1\.0 MiB free, and its files may take 2\.0 MiB; free some space\."):
        check_folder("checkpoints", tmp_path / "new", needed=2**21)
    check_folder("checkpoints", tmp_path / "new", needed=2**19)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_needs_space_for_all_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are kept: the best and the last; a resumed run has them already, and writes one beside them."""
    made = module()
    size = 3 * sum(parameter.numel() * parameter.element_size() for parameter in made.parameters())
    free = int(1.5 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))
    saver = ModelCheckpoint(dirpath=tmp_path / "new", filename="best", save_last=True)
    run = trainer(tmp_path, saver, max_steps=1, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"new has \d\.\d MiB free, and its files may take"):
        run.fit(made, data())
    for name in ("best.ckpt", "last.ckpt"):
        (tmp_path / "new" / name).touch()
    trainer(tmp_path, saver, max_steps=1, enable_checkpointing=True).fit(module(), data())


def test_a_folder_that_turns_read_only_within_a_save_is_named(tmp_path: Path) -> None:
    """The partial file cannot be removed either."""
    command = started(_lock, tmp_path)
    command.join(60)
    assert (tmp_path / "said").read_text(encoding="utf-8").startswith("saving: ")
    assert command.exitcode == 0


def _lock(folder: Path) -> None:
    give_up_capabilities()
    target = folder / "target"
    target.mkdir()
    try:
        with atomic_file(target / "file") as partial:
            partial.write_text("new", encoding="utf-8")
            target.chmod(0o555)
    except ValueError as error:
        (folder / "said").write_text(str(error), encoding="utf-8")
    target.chmod(0o755)


def test_what_does_not_read_back_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr(saving, "damaged_record", lambda path: "archive/data/0")
    with pytest.raises(ValueError, match="archive/data/0 did not read back"):
        save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_target_that_is_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ValueError, match=r"report\.html could not be written \(Is a directory\)"):
        write_text(tmp_path / "report.html", "text")
