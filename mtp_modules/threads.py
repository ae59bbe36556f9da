"""How many OpenMP threads torch uses, and how they wait: read once, when torch loads, so set before it is imported."""

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables that decide how threads wait: the standard's, GNU's and Intel's."""


SHORT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Spin for some microseconds (GNU) or a millisecond (Intel), then sleep."""

PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Sleep at once: best beside busy processes, but up to a third slower on a machine that is idle otherwise."""


def prepare_threads(
    environment: MutableMapping[str, str], *, root: Path = Path("/"), pause: Callable[[float], None] = time.sleep
) -> None:
    """Let threads that wait sleep soon, and use no more of them than a container's quota has processors for.

    By default threads spin at every barrier, for long. Beside one busy process, the thread that waits then keeps the
    processor that the thread it waits for needs. Where other processes are busy now, threads sleep at once. What the
    environment says already is kept.

    Args:
        environment: Changed in place; child processes get a copy of it.
        root: Where ``proc`` and ``sys`` are.
        pause: Waits between two looks at how busy the processors are.
    """
    usable = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    limit = min(_quotas(root), default=float(len(usable)))
    if "OMP_NUM_THREADS" not in environment and limit < len(usable):
        # Otherwise torch finds the number by itself, and launchers divide it among processes.
        environment["OMP_NUM_THREADS"] = str(max(1, int(limit)))
    if not any(name in environment for name in WAITING):
        threads = min(limit, len(usable), float(environment.get("OMP_NUM_THREADS", "inf")))
        environment.update(PASSIVE if _idle(usable, root, pause) < threads - 0.5 else SHORT)


def _idle(usable: Collection[int], root: Path, pause: Callable[[float], None]) -> float:
    """Return how many of some processors are idle; infinity where the system does not tell."""
    before = _times(usable, root)
    if not before:
        return math.inf
    pause(0.1)
    after = _times(usable, root)
    shares = ((after[cpu][0] - idle) / max(after[cpu][1] - total, 1) for cpu, (idle, total) in before.items())
    return sum(shares)


def _times(usable: Collection[int], root: Path) -> dict[str, tuple[int, int]]:
    """Return the ticks that each processor was idle, and all its ticks."""
    wanted, found = {f"cpu{number}" for number in usable}, {}
    for line in _text(root / "proc/stat").splitlines():
        name, *ticks = line.split()
        if name in wanted and len(ticks) > 4:
            numbers = [int(tick) for tick in ticks[:8]]  # then come those of guests, counted already
            found[name] = numbers[3] + numbers[4], sum(numbers)
    return found


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
