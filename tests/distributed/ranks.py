"""Run a function on two processes that talk by gloo, and bring back what each returns."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

WORLD_SIZE = 2
PRELOADED = ["torch", "lightning.pytorch", "mtp_modules.cli", "mtp_modules.studies.training", "tests.distributed.runs"]
"""Imported once by the server that every rank is forked from, and the workers of studies that are tested later."""


def run_ranks(
    function: Callable[..., Any], *arguments: Any, timeout: float = 60, world_size: int = WORLD_SIZE
) -> list[Any]:
    """Call ``function(*arguments)`` on every rank, and return what the ranks return, rank 0 first.

    The function must be importable by name. A rank that raises, dies or takes longer than ``timeout`` seconds ends all
    of them, and the traceback is raised here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout, function, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _wait(ranks: list[Any], folder: Path, until: float) -> None:
    """Return when all ranks have ended well; raise as soon as one has not."""
    while True:
        ended = [process.exitcode for process in ranks]
        if any(ended):
            # One that fails takes the other along, which may be the first to end: tell what each said.
            told = {rank: folder / f"{rank}.txt" for rank in range(len(ranks))}
            said = {rank: file.read_text(encoding="utf-8") for rank, file in told.items() if file.exists()}
            died = {rank: f"it died with exit code {code}" for rank, code in enumerate(ended) if code}
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted({**died, **said}.items())))
        if None not in ended:
            return
        if time.monotonic() > until:
            raise AssertionError(f"ranks took too long; exit codes so far: {ended}")
        ranks[ended.index(None)].join(0.1)


def _rank(
    rank: int, world_size: int, folder: str, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # Lightning reads these as the mark of processes that somebody else has started.
    places = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for workers of data, as where a user starts the run
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
