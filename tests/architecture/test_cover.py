"""The pairs of trunk and heads that every run tries leave nothing out."""

import itertools

import pytest

from tests.helpers import (
    COVER,
    EVERY_HEADS,
    LEAPS,
    TRUNKS,
    TRUNKS_WITH_EVERY_HEADS,
    TRUNKS_WITH_HEADS,
    TRUNKS_WITH_LEAPS,
    covering,
)
from tests.mutation import MUTANTS


def in_every_run(pairs: list[pytest.ParameterSet]) -> set[tuple[object, ...]]:
    return {pair.values for pair in pairs if not pair.marks}


def test_every_trunk_and_every_kind_of_heads_is_tried() -> None:
    tried = in_every_run([*TRUNKS_WITH_EVERY_HEADS, *TRUNKS_WITH_LEAPS])
    assert tried == {(trunk, name) for trunk, heads in COVER.items() for name in heads}
    assert {trunk for trunk, _ in tried} == set(TRUNKS)
    assert {name for _, name in tried} == {*EVERY_HEADS, *LEAPS}
    assert {trunk for trunk, _ in in_every_run(TRUNKS_WITH_HEADS)} == set(TRUNKS)


def test_every_run_has_the_tests_that_kill_mutants() -> None:
    named = (node.partition("[")[2].rstrip("]").split("-") for mutant in MUTANTS for node in mutant.killers)
    pairs = {(parts[-2], parts[-1]) for parts in named if len(parts) > 1 and parts[-2] in TRUNKS}
    assert len(pairs) > 3
    assert {(trunk, heads) for trunk, heads in pairs if heads not in COVER[trunk]} == set()


def test_the_nightly_session_tries_the_others() -> None:
    pairs = [*TRUNKS_WITH_EVERY_HEADS, *TRUNKS_WITH_LEAPS]
    assert len(in_every_run(pairs)) < len(pairs) // 2
    assert {mark.name for pair in pairs for mark in pair.marks} == {"nightly"}


@pytest.mark.parametrize(("strength", "size"), [(1, 3), (2, 6), (3, 12)])
def test_a_covering_part_has_all_values_together(strength: int, size: int) -> None:
    axes = ("abc", (False, True), (1, 2))
    product = covering(*axes, strength=strength)
    assert [pair.values for pair in product] == list(itertools.product(*axes))
    tried = in_every_run(product)
    assert len(tried) == size
    for places in itertools.combinations(range(3), strength):
        met = {tuple(values[place] for place in places) for values in tried}
        assert met == set(itertools.product(*(axes[place] for place in places)))
