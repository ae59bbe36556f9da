"""Signals to the command line, before, in and after training."""

import os
import signal
import time
from pathlib import Path
from statistics import median

import pytest

from mtp_modules.loading import read_checkpoint
from tests.faults.processes import ALL, SMALL, Command, times

LONG = ("fit", *SMALL, "--trainer.max_epochs=-1", "--trainer.max_steps=100000")
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def last_of(folder: Path) -> Path:
    (found,) = folder.rglob("last.ckpt")
    return found


def tell(capsys: pytest.CaptureFixture[str], what: str, seconds: list[float]) -> None:
    """Print the figures of the page on reliability."""
    if ALL:
        with capsys.disabled():
            print(f"\n{what}: {len(seconds)} exits, median {median(seconds):.2f} s, at most {max(seconds):.2f} s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_at_once_with_its_status(
    tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = []
    for _ in range(times(1, 10)):
        command = Command(tmp_path, *LONG, at="setup")
        command.wait_for_mark()
        sent = time.monotonic()
        command.signal(number)
        assert command.status() == 128 + number
        seconds.append(time.monotonic() - sent)
        assert seconds[-1] < 15  # of the 20 seconds that the setup takes
        assert not list(tmp_path.rglob("*.ckpt"))
    tell(capsys, f"{signal.Signals(number).name} before training", seconds)


def test_a_signal_in_training_saves_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for number in range(times(1, 10)):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = Command(folder, *LONG, at=3)
        command.wait_for_mark()
        sent = time.monotonic()
        command.signal(signal.SIGTERM)
        assert command.status() == 128 + signal.SIGTERM
        seconds.append(time.monotonic() - sent)
        saved = last_of(folder)
        step = read_checkpoint(saved)["global_step"]
        assert step >= 4
        assert f"Stopped after step {step}; the checkpoint is {saved.relative_to(folder)}" in command.output()
    tell(capsys, "SIGTERM in training", seconds)


def test_a_second_signal_ends_a_slow_step(tmp_path: Path) -> None:
    command = Command(tmp_path, *LONG, at="start", slow=20)
    command.wait_for_mark()
    sent = time.monotonic()
    command.signal(signal.SIGTERM)
    time.sleep(0.5)
    command.signal(signal.SIGTERM)
    assert command.status() == 128 + signal.SIGTERM
    assert time.monotonic() - sent < 15
    assert not list(tmp_path.rglob("*.ckpt"))


def test_slurm_requeues_a_job_that_goes_on_where_it_stopped(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n', encoding="utf-8")
    scontrol.chmod(0o755)
    environment = {**SLURM, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    first = Command(tmp_path, *LONG, at=3, environment=environment)
    first.wait_for_mark()
    first.signal(signal.SIGUSR1)
    assert first.status() == 128 + signal.SIGUSR1
    assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 77\n"
    saved = last_of(tmp_path)
    stopped = read_checkpoint(saved)["global_step"]
    second = Command(tmp_path, *LONG, f"--trainer.max_steps={stopped + 2}", environment=environment)
    assert second.status() == 0, second.output()
    assert last_of(tmp_path) == saved  # in the same folder
    assert read_checkpoint(saved)["global_step"] == stopped + 2
    third = Command(tmp_path, *LONG, "--trainer.max_steps=2", environment={**environment, "SLURM_JOB_ID": "78"})
    assert third.status() == 0, third.output()
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2  # another job is another run
