"""Put every mutant back in, one at a time, and check that the tests that must kill it do.

    python -m tests.mutation.run -n 2
    python -m tests.mutation.run tree empty-residual --table docs/decoding_proof.md

Works on a copy in a temporary folder. Prints a Markdown table, and fails if a mutant survives.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutation import MUTANTS
from tests.mutation.mutant import PACKAGE, ROOT, Mutant

_PASSED, _FAILED = 0, 1  # of pytest; other codes say that no test was run, or that the run broke
_STRANGE = 70
_MARKS = "<!-- mutants: begin -->", "<!-- mutants: end -->"
_SECONDS_A_TEST = "120"
_PRELOADED = ["torch", "torchmetrics", "lightning.pytorch", "hypothesis", "beartype", "safetensors.torch"]
"""Loaded once: each mutant's process is forked from one that has them, which spares it most of its time."""


class Verdict(NamedTuple):
    """What became of a mutant.

    Attributes:
        mutant: The bug.
        killed_by: The test that killed it; ``None`` if none did.
        seconds: How long it took.
        output: The last lines of the tests, for what went wrong.
    """

    mutant: Mutant
    killed_by: str | None
    seconds: float
    output: str


@contextmanager
def copy_of_the_project() -> Iterator[Path]:
    """Yield a folder with the package, its tests and their settings, and nothing that was compiled."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name).resolve()
        for part in (PACKAGE, "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        yield folder


def _in_the_copy(folder: Path, arguments: list[str], log: Path) -> None:
    """Run pytest in a fresh process, with the copy's package and tests and no others; the exit code is pytest's."""
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    os.environ |= {"HYPOTHESIS_PROFILE": "mutants", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "tests")]:
        del sys.modules[name]
    code = int(pytest.main(arguments))
    imported = getattr(sys.modules.get(PACKAGE), "__file__", None)
    if imported is not None and folder not in Path(imported).parents:
        print(f"the tests imported {imported}, not the copy.")
        code = _STRANGE
    sys.stdout.flush()
    os._exit(code)


def run_tests(folder: Path, nodes: Iterable[str], *options: str) -> tuple[int, str]:
    """Run tests of a copy; return the exit code of pytest, or another if it broke, and the end of what it said.

    Args:
        folder: Of the copy.
        nodes: Node ids below ``tests``.
        options: Further ones.
    """
    log = folder / "log.txt"
    fixed = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    arguments = [*fixed, "--timeout", _SECONDS_A_TEST, *options, *(f"tests/{node}" for node in nodes)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_in_the_copy, args=(folder, arguments, log))
    process.start()
    process.join()
    code = process.exitcode
    return (-1 if code is None else code), log.read_text(errors="replace")[-4000:]


def check_the_copy(mutants: Sequence[Mutant]) -> str | None:
    """Say what is wrong with an unmutated copy, if anything is: without that, a failing test proves nothing."""
    with copy_of_the_project() as folder:
        code, output = run_tests(folder, dict.fromkeys(node for mutant in mutants for node in mutant.killers))
        return None if code == _PASSED else f"without a mutant the tests fail:\n{output}"


def try_out(mutant: Mutant) -> Verdict:
    """Run the tests that must kill a mutant.

    Raises:
        RuntimeError: If they could not be run.
    """
    started = time.perf_counter()
    with copy_of_the_project() as folder:
        path = folder / PACKAGE / mutant.file
        path.write_text(mutant.mutated(path.read_text(encoding="utf-8")), encoding="utf-8")
        code, output = run_tests(folder, mutant.killers, "-x")
    seconds = time.perf_counter() - started
    if code == _PASSED:
        return Verdict(mutant, None, seconds, output)
    killer = re.search(r"^FAILED tests/(\S+?)(\[| - |$)", output, flags=re.MULTILINE)
    if code != _FAILED or killer is None:
        raise RuntimeError(f"{mutant.name}: the tests ended with {code}.\n{output}")
    return Verdict(mutant, killer[1], seconds, output)


def table(verdicts: Iterable[Verdict]) -> str:
    """Return the Markdown table of all verdicts."""
    lines = ["| mutant | what goes wrong | seen in | file | killed by |", "|---|---|---|---|---|"]
    for mutant, killed_by, _, _ in verdicts:
        killer = "**nothing**" if killed_by is None else f"`{killed_by.rpartition('::')[2]}`"
        lines.append(f"| {mutant.name} | {mutant.what} | {mutant.seen_in} | `{mutant.file}` | {killer} |")
    return "\n".join(lines)


def write_table(path: Path, text: str) -> None:
    """Put the table between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    begin, end = (page.index(mark) for mark in _MARKS)
    path.write_text(f"{page[: begin + len(_MARKS[0])]}\n{text}\n{page[end:]}", encoding="utf-8")


def main() -> int:
    """Run what was asked for; return how many mutants survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="run only mutants whose name holds one of these")
    parser.add_argument("-n", type=int, default=1, help="how many at the same time")
    parser.add_argument("--table", type=Path, help="a page to write the table to")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or any(name in m.name for name in options.names)]
    if not chosen:
        parser.error(f"no mutant's name holds {' or '.join(options.names)}.")
    for mutant in chosen:
        mutant.mutated((ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8"))
    if problem := check_the_copy(chosen):
        parser.error(problem)
    verdicts = []
    with ThreadPoolExecutor(options.n) as workers:
        for verdict in workers.map(try_out, chosen):
            verdicts.append(verdict)
            killer = verdict.killed_by or "SURVIVED"
            print(f"{verdict.mutant.name}: {killer} ({verdict.seconds:.0f} s)", file=sys.stderr, flush=True)
    print(table(verdicts))
    survivors = [verdict for verdict in verdicts if verdict.killed_by is None]
    print(f"\n{len(verdicts) - len(survivors)} of {len(verdicts)} mutants were killed.")
    if options.table is not None:
        write_table(options.table, table(verdicts))
    return len(survivors)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
