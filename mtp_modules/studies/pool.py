"""Worker processes: each job in one of its own, on one thread, and none left behind."""

import logging
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from mtp_modules.core.checks import InputError, refusal_behind

PRELOADED = ["mtp_modules.studies.training"]
"""Imported once, by the server that workers are forked from."""

_TELL_EVERY = 0.5


@dataclass(frozen=True)
class Job:
    """Something to do in a process.

    Attributes:
        name: For messages.
        function: Importable; called with the arguments, ``device`` and ``tell``.
        arguments: Picklable.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Event:
    """News of a job.

    Attributes:
        job: Which.
        kind: ``"step"``, ``"done"``, ``"refused"`` (bad input, in one sentence) or ``"failed"`` (a traceback).
        value: Steps, result, or text.
    """

    job: Job
    kind: str
    value: Any


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return how many runs go at a time: one a GPU, or one a core where there is none."""
    return torch.cuda.device_count() or cores()


def run_jobs(jobs: Sequence[Job], *, workers: int) -> Generator[Event, None, None]:
    """Do all jobs, some at a time, and yield what is heard of them.

    Close the iterator to end all processes.

    Args:
        jobs: In the order to begin them.
        workers: How many at a time. With GPUs, worker ``i`` uses GPU ``i`` modulo their number.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    gpus = torch.cuda.device_count()
    waiting, idle = list(reversed(jobs)), list(reversed(range(workers)))
    running: dict[Connection, tuple[Job, Any, int]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                job, worker = waiting.pop(), idle.pop()
                receiver, sender = context.Pipe(duplex=False)
                device = worker % gpus if gpus else None
                process = context.Process(target=_work, args=(job, device, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (job, process, worker)
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                job, process, worker = running[ready]
                try:
                    kind, value = ready.recv()
                except EOFError:
                    process.join()
                    kind, value = "failed", f"its process died with exit code {process.exitcode}."
                if kind != "step":
                    ready.close()
                    process.join()
                    del running[ready]
                    idle.append(worker)
                yield Event(job, kind, value)
    finally:
        for _, process, _ in running.values():
            process.kill()
        for connection, (_, process, _) in running.items():
            process.join()
            connection.close()


def _work(job: Job, device: int | None, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends workers
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        result = job.function(*job.arguments, device=device, tell=_Teller(sender))
        sender.send(("done", result))
    except InputError as error:
        sender.send(("refused", str(error)))
    except BrokenPipeError:
        raise SystemExit(1) from None  # the parent is gone
    except BaseException as error:
        refused = refusal_behind(error)
        sender.send(("failed", traceback.format_exc()) if refused is None else ("refused", str(refused)))


class _Teller:
    """Tell the parent how far a job is, but not at every step."""

    def __init__(self, sender: Connection) -> None:
        self.sender, self.told = sender, 0.0

    def __call__(self, step: int) -> None:
        if time.monotonic() - self.told > _TELL_EVERY:
            self.told = time.monotonic()
            self.sender.send(("step", step))
