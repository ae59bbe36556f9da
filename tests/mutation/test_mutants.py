"""Every mutant still fits the source, and so do the tests that must kill it. `nox -s mutants` runs them."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from tests.mutation import MUTANTS
from tests.mutation.mutant import PACKAGE, ROOT, Mutant

EACH = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@EACH
def test_its_fragment_occurs_exactly_once_and_its_replacement_can_be_parsed(mutant: Mutant) -> None:
    source = (ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8")
    changed = mutant.mutated(source)
    assert changed != source
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


@cache
def functions_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@EACH
def test_the_tests_that_must_kill_it_are_there(mutant: Mutant) -> None:
    assert mutant.killers
    for node in mutant.killers:
        file, _, test = node.partition("::")
        assert test.partition("[")[0] in functions_in(file)


def test_names_and_bugs_are_told_once() -> None:
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    assert max(Counter((mutant.file, mutant.fragment, mutant.replacement) for mutant in MUTANTS).values()) == 1


@pytest.mark.parametrize("fragment", ["is not there", "choose"])
def test_a_fragment_that_is_not_there_once_is_refused(fragment: str) -> None:
    mutant = Mutant("some", "decoders/drafting/drafter.py", fragment, "", "", "", ())
    count = {"is not there": 0}.get(fragment, "[1-9][0-9]*")
    with pytest.raises(
        ValueError,
        match=rf"^some: the fragment must occur exactly once in decoders/drafting/drafter\.py, it occurs {count} times",
    ):
        mutant.mutated((ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8"))


def test_the_page_lists_every_mutant_and_the_test_that_killed_it() -> None:
    page = (ROOT / "docs" / "decoding_proof.md").read_text(encoding="utf-8").partition("<!-- mutants: begin -->")[2]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    listed = {row[0].removeprefix("| "): row for row in rows}
    for mutant in MUTANTS:
        row = listed[mutant.name]
        assert row[1:4] == [mutant.what, mutant.seen_in, f"`{mutant.file}`"]
        killer = row[4].removesuffix(" |").strip("`")
        named = {node.partition("::")[2].partition("[")[0] for node in mutant.killers}
        assert killer in named
    assert len(listed) == len(MUTANTS) + 1  # the head


def test_an_unknown_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutation.run", "no such"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no mutant's name holds no such." in done.stderr
