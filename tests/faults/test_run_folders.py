"""A second run beside the first, one that goes on, and two at once."""

import os
import signal
from pathlib import Path

import pytest
import yaml

from mtp_modules.configuration.run_folder import ORIGIN, RunFolder, find_named, runs_of
from mtp_modules.loading import read_checkpoint
from tests.command_line import refusal
from tests.faults.processes import SMALL, Command

FIT = ("fit", *SMALL, "--trainer.max_epochs=1")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_second_run_has_a_folder_of_its_own_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    first, second = tmp_path / "runs" / "notebook", tmp_path / "runs" / "notebook-2"
    assert Command(tmp_path, *FIT).status() == 0
    whole = files(first)
    assert {"config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= whole.keys()
    assert Command(tmp_path, *FIT, "--seed_everything=2").status() == 0
    assert files(first) == whole
    assert {"config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files(second).keys()
    resumed = Command(tmp_path, *FIT, "--ckpt_path=runs/notebook/checkpoints/last.ckpt", "--trainer.max_epochs=2")
    assert resumed.status() == 0, resumed.output()
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {"notebook", "notebook-2"}
    assert read_checkpoint(first / "checkpoints" / "last.ckpt")["global_step"] == 4
    newest = Command(tmp_path, *FIT, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert newest.status() == 0, newest.output()
    assert (
        read_checkpoint(first / "checkpoints" / "last.ckpt")["global_step"] == 6
    )  # which was saved after the second's
    assert read_checkpoint(second / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    running = Command(tmp_path, *FIT, "--trainer.max_epochs=-1", "--trainer.max_steps=100000", at=5, slow=0.05)
    running.wait_for_mark()
    beside = Command(tmp_path, *FIT)
    resumed = Command(tmp_path, *FIT, "--ckpt_path=runs/notebook")
    assert beside.status() == 0
    assert resumed.status() == 1
    assert "error: ckpt_path: another process trains in runs/notebook; wait for its end" in resumed.output()
    running.signal(signal.SIGTERM)
    assert running.status() == 143
    assert (tmp_path / "runs" / "notebook-2" / "checkpoints" / "best.ckpt").exists()


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()
    held = RunFolder(tmp_path / "run")
    other = RunFolder(tmp_path / "run")
    assert (held.path.name, other.path.name) == ("run", "run-2")
    (held.path / "config.yaml").touch()
    for folder in (held, other):
        folder.release()
    assert [folder.name for folder in runs_of(tmp_path / "run")] == ["run"]
    third = RunFolder(tmp_path / "run")
    assert third.path.name == "run-2"
    third.release()


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_name_without_a_checkpoint_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(*FIT, f"--ckpt_path={name}") == (
        f"ckpt_path: no run in runs/notebook has a {name}.ckpt; leave --ckpt_path out to start a new run, "
        "or give a file."
    )
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_that_was_saved_last_is_meant(tmp_path: Path) -> None:
    """A number says nothing of it: a folder that was removed is used again. Nor is every number a run of this name."""
    for time, folder in enumerate(("run-2", "run", "run-7", "run-10")):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
        if folder != "run-10":
            (tmp_path / folder / "checkpoints" / "last.ckpt").touch()
            os.utime(tmp_path / folder / "checkpoints" / "last.ckpt", (time, time))
    (tmp_path / "run-7" / ORIGIN).write_text("run-7\n", encoding="utf-8")
    assert find_named("last", tmp_path / "run") == tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert find_named("last", tmp_path / "run-7") == tmp_path / "run-7" / "checkpoints" / "last.ckpt"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "last.ckpt").touch()
    assert find_named("last", tmp_path / "run", [tmp_path / "own"]) == tmp_path / "own" / "last.ckpt"


def test_a_number_that_something_else_has_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run-2").touch()
    (tmp_path / "run-3").symlink_to("nowhere")
    folder = RunFolder(tmp_path / "run")
    assert folder.path.name == "run-4"
    folder.release()


def test_a_folder_of_its_own_is_not_written_to_twice(tmp_path: Path) -> None:
    saver = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "own", "filename": "best", "save_last": True}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [saver]}}), encoding="utf-8")
    fit = (*FIT, "--config", "own.yaml")
    assert Command(tmp_path, *fit).status() == 0
    whole = files(tmp_path / "own")
    assert whole.keys() == {"best.ckpt", "last.ckpt"}
    again = Command(tmp_path, *fit)
    assert again.status() == 1
    assert "error: trainer.callbacks: dirpath own holds best.ckpt of another run, which this one" in again.output()
    assert files(tmp_path / "own") == whole
    resumed = Command(tmp_path, *fit, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert resumed.status() == 0, resumed.output()
    assert read_checkpoint(tmp_path / "own" / "last.ckpt")["global_step"] == 4
