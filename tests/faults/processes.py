"""Processes that are forked from a server with everything imported, to be killed, stopped or starved."""

import ctypes
import multiprocessing
import os
import resource
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mtp_modules.cli import main
from mtp_modules.training import MTPModule
from tests.distributed.ranks import PRELOADED

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "configs" / "notebook.yaml"
ALL = os.environ.get("FAULTS") == "all"
"""Whether the session that publishes the figures runs, with many more faults."""

SMALL = (
    *("--config", NOTEBOOK, "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--data.init_args.num_train=64", "--data.init_args.num_val=32", "--data.init_args.num_test=32"),
    *("--trainer.accelerator=cpu", "--trainer.num_sanity_val_steps=0"),
)
"""A run of 2 steps an epoch."""


def times(few: int, many: int) -> int:
    """Return how many faults to inject."""
    return many if ALL else few


def started(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return a running process that calls a function."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "tests.faults.processes", "tests.faults.saving"])
    process = context.Process(target=_call, args=(function, arguments), daemon=False)
    process.start()
    return process


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    function(*arguments)


def killed_midway(function: Callable[..., Any], path: Path, file: Path, seconds: float) -> None:
    """Let a process call ``function(path)``, and kill it some seconds after it has replaced ``file`` once."""
    before = file.stat().st_ino if file.exists() else None
    process = started(function, path)
    until = time.monotonic() + 120
    while (not file.exists() or file.stat().st_ino == before) and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.join()


class Command:
    """``python -m mtp_modules`` in a process of its own.

    Args:
        folder: Working directory.
        arguments: Of the command line.
        at: Where to touch the file ``mark``: ``setup``, ``start`` or a number of finished steps.
        slow: Seconds to add to each step.
        environment: Variables to add.
        ordinary: Give up root's right to write everywhere.
        file_limit: Largest file that the process may write, in bytes.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        at: str | int = "start",
        slow: float = 0.0,
        environment: Mapping[str, str] | None = None,
        ordinary: bool = False,
        file_limit: int | None = None,
    ) -> None:
        self.folder, self.log, self.mark = folder, folder / f"log-{time.monotonic_ns()}", folder / "mark"
        self.mark.unlink(missing_ok=True)
        given = (
            str(folder),
            str(self.log),
            [*map(str, arguments)],
            at,
            slow,
            dict(environment or {}),
            ordinary,
            file_limit,
        )
        self.process = started(_command, *given)

    def wait_for_mark(self, seconds: float = 60) -> None:
        """Wait until the process is where the test wants it."""
        until = time.monotonic() + seconds
        while not self.mark.exists():
            assert self.process.is_alive(), self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self.process.pid, number)

    def status(self, seconds: float = 90) -> int:
        """Wait for the end; return the exit status, negative for a signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.output()}")
        return int(self.process.exitcode)

    def output(self) -> str:
        """Return all that the process has printed."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def _command(
    folder: str,
    log: str,
    arguments: list[str],
    at: str | int,
    slow: float,
    environment: dict[str, str],
    ordinary: bool,
    file_limit: int | None,
) -> None:
    os.chdir(folder)
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if ordinary and os.getuid() == 0:
        give_up_capabilities()
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    _mark(Path(folder, "mark"), at, slow)
    sys.argv = ["python -m mtp_modules", *arguments]
    main()


def give_up_capabilities() -> None:
    """Clear this process's Linux capabilities, so that permissions of files apply to root as well."""
    version = struct.pack("Ii", 0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(version, bytes(24)) == 0


def _mark(mark: Path, at: str | int, slow: float) -> None:
    """Let the module touch a file when it gets somewhere, and take its time."""
    setup, step = MTPModule.setup, MTPModule.training_step

    def slow_setup(self: MTPModule, stage: str) -> None:
        if at == "setup":
            mark.touch()
            for _ in range(200):  # a signal between a check for signals and a single long sleep would wait for its end
                time.sleep(0.1)
        setup(self, stage)

    def slow_step(self: MTPModule, batch: Any, batch_idx: int) -> Any:
        if at == "start" or self.trainer.global_step == at:
            mark.touch()
        time.sleep(slow)
        return step(self, batch, batch_idx)

    MTPModule.setup, MTPModule.training_step = slow_setup, slow_step  # type: ignore[method-assign]
