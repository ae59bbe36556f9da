"""Threads wait without spinning, and are as many as a container may use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_modules.threads import PASSIVE, SHORT, WAITING, prepare_threads
from tests.command_line import ROOT

QUOTAS = {
    "no group": ({}, None),
    "no quota": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "own": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}, "3"),
    "less than one": ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, "1"),
    "as many as there are": ({"sys/fs/cgroup/cpu.max": "800000 100000\n"}, None),
    "of a parent": (
        {
            "proc/self/cgroup": "0::/slice/run\n",
            "sys/fs/cgroup/slice/run/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slice/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/cpu.max": "700000 100000\n",
        },
        "2",
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/x\n3:cpuacct,cpu:/docker/1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        "4",
    ),
    "version 1 without": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "broken": ({"proc/self/cgroup": "what\n", "sys/fs/cgroup/cpu.max": "many 0 0\n"}, None),
}


def test_a_quota_limits_the_threads_and_what_a_user_set_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    for name, (files, threads) in QUOTAS.items():
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text, encoding="utf-8")
        environment: dict[str, str] = {}
        prepare_threads(environment, root=tmp_path / name)
        assert environment == SHORT | ({} if threads is None else {"OMP_NUM_THREADS": threads}), name
    for name in WAITING:
        environment = {name: "own", "OMP_NUM_THREADS": "7"}
        prepare_threads(environment, root=tmp_path / "own")
        assert environment == {name: "own", "OMP_NUM_THREADS": "7"}


BUSY: dict[str, tuple[tuple[int, ...], dict[str, str], dict[str, str]]] = {
    "idle": ((0, 0, 9, 9), {}, SHORT),
    "one of two": ((10, 1, 0, 0), {}, PASSIVE),
    "half of one": ((4, 0, 0, 0), {}, SHORT),
    "both": ((10, 9, 0, 0), {}, PASSIVE),
    "one of two, for one thread": ((10, 1, 0, 0), {"OMP_NUM_THREADS": "1"}, SHORT),
    "set by the user": ((10, 10, 0, 0), {"OMP_WAIT_POLICY": "active"}, {}),
}
"""Ticks of ten in which other processes ran, on each of four processors, of which this process may use two."""


@pytest.mark.parametrize("name", BUSY)
def test_threads_sleep_at_once_beside_busy_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    busy, given, chosen = BUSY[name]
    (tmp_path / "proc").mkdir()

    def write(total: int, ticks: tuple[int, ...]) -> None:
        lines = [f"cpu{cpu} {100 + tick} 0 0 {total - 100 - tick} 0 0 0 0 0 0" for cpu, tick in enumerate(ticks)]
        (tmp_path / "proc/stat").write_text("\n".join(["cpu 1 2 3 4 5", *lines, "ctxt 5"]), encoding="utf-8")

    write(1000, (0, 0, 0, 0))
    environment = dict(given)
    prepare_threads(environment, root=tmp_path, pause=lambda _: write(1010, busy))
    assert environment == given | chosen


SPY = """
import json, os, subprocess, sys
sys.path.insert(0, {root!r})
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            child = "import json, os; print(json.dumps(dict(os.environ)))"
            print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Spy())
import runpy
sys.argv = ["mtp_modules", "fit"]
runpy.run_module("mtp_modules", run_name="__main__")
"""


def test_the_command_line_sets_them_before_torch_loads() -> None:
    """The import of torch is where a child process tells its environment."""
    for given in ({}, {"GOMP_SPINCOUNT": "100", "OMP_NUM_THREADS": "3"}):
        left = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
        command = [sys.executable, "-c", SPY.format(root=str(ROOT))]
        said = subprocess.run(command, env=left | given, capture_output=True, text=True, check=True, timeout=60).stdout
        environment = json.loads(said)
        waiting = {name: environment[name] for name in WAITING if name in environment}
        assert waiting in ((SHORT, PASSIVE) if not given else ({"GOMP_SPINCOUNT": "100"},))
        assert environment.get("OMP_NUM_THREADS") == given.get("OMP_NUM_THREADS", environment.get("OMP_NUM_THREADS"))
