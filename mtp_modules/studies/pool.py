"""Run jobs in worker processes: one process and one thread per job, and no process outlives the pool."""

import logging
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from mtp_modules.core.checks import InputError, refusal_behind

PRELOADED = ["mtp_modules.studies.training"]
"""Modules that the fork server imports once, before it forks workers."""

_REPORT_INTERVAL = 0.5
_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """A function call for a worker process.

    Attributes:
        name: Name of the job in messages.
        function: An importable function; called with the arguments, ``device`` and ``report_step``.
        arguments: Picklable arguments.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Event:
    """An event of a job.

    Attributes:
        job: The job.
        kind: ``"step"``, ``"done"``, ``"refused"`` (invalid input, in one sentence) or ``"failed"`` (a traceback).
        value: Number of steps, result, or text.
    """

    job: Job
    kind: str
    value: Any


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return the number of parallel runs: one per GPU, or one per core without a GPU."""
    return torch.cuda.device_count() or cores()


def run_jobs(jobs: Sequence[Job], *, workers: int) -> Generator[Event, None, None]:
    """Run all jobs, ``workers`` of them in parallel, and yield their events.

    Closing the generator ends all processes.

    Args:
        jobs: Jobs, in the order in which they start.
        workers: Number of parallel jobs. With GPUs, worker ``i`` uses GPU ``i`` modulo the number of GPUs.
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
                with _signals_later():
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


@contextmanager
def _signals_later() -> Iterator[None]:
    """Defer signals while a worker starts: a worker whose job was sent in part would print a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(job: Job, device: int | None, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        result = job.function(*job.arguments, device=device, report_step=_StepReporter(sender))
        sender.send(("done", result))
    except InputError as error:
        sender.send(("refused", str(error)))
    except BrokenPipeError:
        raise SystemExit(1) from None  # the parent process has ended
    except BaseException as error:
        refused = refusal_behind(error)
        sender.send(("failed", traceback.format_exc()) if refused is None else ("refused", str(refused)))


class _StepReporter:
    """Report steps to the parent process, at most once every ``_REPORT_INTERVAL`` seconds."""

    def __init__(self, sender: Connection) -> None:
        self.sender, self.reported = sender, 0.0

    def __call__(self, step: int) -> None:
        if time.monotonic() - self.reported > _REPORT_INTERVAL:
            self.reported = time.monotonic()
            self.sender.send(("step", step))
