"""How many OpenMP threads torch uses, and how they wait: read once, when torch loads, so set before it is imported."""

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables that decide how threads wait: the standard's, GNU's and Intel's."""


SHORT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Spin for some microseconds (GNU) or a millisecond (Intel), then sleep.

Sleeping at once costs a third of the speed on an idle machine; spinning on costs nearly all of it beside a busy one.
"""


def prepare_threads(environment: MutableMapping[str, str], *, root: Path = Path("/")) -> None:
    """Let threads that wait sleep soon, and use no more of them than a container's quota has processors for.

    By default threads spin at every barrier, for long. Beside one busy process, the thread that waits then keeps the
    processor that the thread it waits for needs. What the environment says already is kept.

    Args:
        environment: Changed in place; child processes get a copy of it.
        root: Where ``proc`` and ``sys`` are.
    """
    if not any(name in environment for name in WAITING):
        environment.update(SHORT)
    if "OMP_NUM_THREADS" not in environment:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        limit = min(_quotas(root), default=float(usable))
        if limit < usable:  # otherwise torch finds the number by itself, and launchers divide it among processes
            environment["OMP_NUM_THREADS"] = str(max(1, int(limit)))


def _quotas(root: Path) -> Iterator[float]:
    """Yield how many processors each control group around this process may use."""
    groups = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, own = (*line.split(":", 2), "", "")[:3]
        version1 = "cpu" in controllers.split(",")
        if controllers and not version1:
            continue
        top = groups / ("cpu" if version1 else "")
        path = top / own.strip("/")
        for folder in {path, *(parent for parent in path.parents if parent.is_relative_to(top)), top}:
            if version1:
                given = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}".split()
            else:
                given = _text(folder / "cpu.max").split()
            if len(given) == 2 and all(number.isdecimal() and int(number) for number in given):  # else "max" or -1
                yield int(given[0]) / int(given[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
