"""Lengths of runs: what is matched is matched, and a budget is kept."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.studies import Cost, Study, makespan, plan_runs, plan_within
from mtp_modules.studies.plan import RESERVE, duration
from tests.unit.studies.tiny import study

MATCHES = st.sampled_from(["data", "flops", "seconds"])
NUMBERS = st.integers(1, 1000)


FIGURES = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(0, 5), st.floats(0, 1))
THREE = st.lists(FIGURES, min_size=3, max_size=3)


def costs(figures: list[tuple[Any, ...]]) -> dict[str, Cost]:
    """Return what arms a, b and c cost. (Made in the test: type checks draw random numbers, strategies must not.)"""
    names = ("examples", "tokens", "flops", "seconds", "wall", "setup", "evaluation")
    found = {}
    for arm, numbers in zip("abc", figures, strict=True):
        given_ = dict(zip(names, numbers, strict=True))
        given_ |= {"seconds": given_["seconds"] / 1000, "wall": given_["wall"] / 1000}
        found[arm] = Cost(**given_, parameters=1, keys=())
    return found


def three_arms(**changes: Any) -> Study:
    return study(arms={"a": {}, "b": {}, "c": {}}, steps=5000, **changes)


@given(MATCHES, THREE, st.floats(0.01, 1.0))
def test_all_arms_use_equally_much(match: str, figures: list[tuple[Any, ...]], scale: float) -> None:
    asked = three_arms(match=match)
    by_arm = costs(figures)
    runs = plan_runs(asked, by_arm, seeds=2, scale=scale)
    assert [run.label for run in runs] == [f"{arm}, seed {seed}" for arm in "abc" for seed in (1, 2)]
    amount = 5000 * scale * by_arm["a"].matched(match)
    for run in runs:
        step = by_arm[run.cell.arm].matched(match)
        assert abs(run.steps * step - amount) <= 0.5 * step + 1e-9 * amount or run.steps == 1 > amount / step


@given(MATCHES, THREE)
def test_an_arm_may_be_matched_otherwise_than_its_study(match: str, figures: list[tuple[Any, ...]]) -> None:
    arms = {"a": {}, "b": {"match": match, "share": 0.5}, "c": {}}
    by_arm = costs(figures)
    runs = {run.cell.arm: run for run in plan_runs(study(arms=arms, steps=1000), by_arm, seeds=1, scale=1.0)}
    half = 500 * by_arm["a"].matched(match) / by_arm["b"].matched(match)
    assert runs["b"].steps == max(1, round(half))
    assert runs["c"].steps == max(1, round(1000 * by_arm["a"].tokens / by_arm["c"].tokens))


def cost(**changes: Any) -> Cost:
    given = {"examples": 4, "tokens": 40, "flops": 1000, "seconds": 0.1, "wall": 0.1, "setup": 1.0, "evaluation": 0.5}
    return Cost(**given | {"parameters": 9, "keys": ()} | changes)


def taught(**changes: Any) -> Study:
    arms = {"plain": {}, "taught": {"model.x": {"helper": "teacher"}, **changes}}
    return study(arms=arms, helpers={"teacher": {"share": 0.25}}, steps=100)


def test_what_a_helper_costs_counts_as_its_arms_own() -> None:
    by_label = {"plain": cost(), "taught": cost(flops=2000), "teacher": cost(flops=3000)}
    runs = {run.cell.arm: run for run in plan_runs(taught(match="flops"), by_label, seeds=1, scale=1.0)}
    assert runs["teacher"].steps == 25
    assert runs["taught"].spent == 25 * 3000
    assert runs["taught"].steps == round((100 * 1000 - 25 * 3000) / 2000)
    used = runs["taught"].steps * 2000 + runs["taught"].spent
    assert abs(used - runs["plain"].steps * 1000) <= 1000


def test_matched_by_data_a_helper_is_only_counted() -> None:
    by_label = {"plain": cost(), "taught": cost(flops=2000), "teacher": cost(flops=3000)}
    runs = {run.cell.arm: run for run in plan_runs(taught(), by_label, seeds=1, scale=1.0)}
    assert (runs["taught"].steps, runs["taught"].spent) == (100, 75000)


def test_a_helper_that_costs_too_much_is_refused() -> None:
    by_label = {"plain": cost(), "taught": cost(), "teacher": cost(flops=8000)}
    sentence = (
        "arm 'taught': is matched by flops, but its helpers alone use 2 times what 'plain' uses; give the helpers"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan_runs(taught(match="flops"), by_label, seeds=1, scale=1.0)


def test_a_budget_leaves_a_short_helper_its_share() -> None:
    by_label = {"plain": cost(), "taught": cost(), "teacher": cost(flops=3500)}
    runs, scale = plan_within(taught(match="flops"), by_label, seeds=1, minutes=0.2, workers=1)
    found = {run.cell.arm: run.steps for run in runs}
    assert scale < 1.0
    assert found["teacher"] == pytest.approx(found["plain"] / 4, abs=1)
    assert found["taught"] + 3.5 * found["teacher"] == pytest.approx(found["plain"], abs=1)


@given(st.lists(st.floats(0, 9), max_size=12), st.integers(1, 4))
def test_the_makespan_is_that_of_a_simulation(seconds: list[float], workers: int) -> None:
    ends: list[float] = [0.0] * workers
    for duration_ in seconds:
        worker = ends.index(min(ends))
        ends[worker] += duration_
    assert makespan(seconds, workers) == pytest.approx(max(ends))


@given(THREE, st.floats(0.5, 60), st.integers(1, 4), st.integers(1, 3))
def test_a_budget_is_kept_and_used(figures: list[tuple[Any, ...]], minutes: float, workers: int, seeds: int) -> None:
    by_arm = costs(figures)
    asked = three_arms(match="flops")
    try:
        runs, scale = plan_within(asked, by_arm, seeds=seeds, minutes=minutes, workers=workers)
    except ValueError as error:
        (enough,) = re.findall(r"; allow ([\d.]+) minutes,", str(error))
        assert float(enough) > minutes
        runs, _ = plan_within(asked, by_arm, seeds=seeds, minutes=float(enough), workers=workers)
        assert duration(runs, by_arm, workers) <= 60 * float(enough)
        return
    assert duration(runs, by_arm, workers) <= RESERVE * 60 * minutes + 1e-6
    if scale < 1.0:  # a little longer would be too long
        longer = plan_runs(asked, by_arm, seeds=seeds, scale=min(1.0, scale * 1.1 + 2 / 5000))
        assert duration(longer, by_arm, workers) > 0.8 * RESERVE * 60 * minutes


def test_a_budget_that_is_large_enough_changes_nothing() -> None:
    by_arm = dict.fromkeys("abc", cost())
    with_budget = plan_within(three_arms(), by_arm, seeds=2, minutes=10**6, workers=1)
    assert with_budget == (plan_within(three_arms(), by_arm, seeds=2, minutes=None, workers=1)[0], 1.0)


def test_a_budget_too_small_is_refused_with_one_that_would_do() -> None:
    sentence = (
        "study: a budget of 0.01 minutes is too small for one step of each of the 6 runs of 'tiny', 2 at a time; "
        "allow 0.1 minutes, or use fewer --seeds."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan_within(three_arms(), dict.fromkeys("abc", cost()), seeds=2, minutes=0.01, workers=2)


@given(st.integers(1, 500), st.integers(1, 60))
def test_evaluations_are_spread_evenly_and_end_with_the_last_step(steps: int, points: int) -> None:
    (run, *_) = plan_runs(study(arms={"a": {}}, steps=steps, points=points), {"a": cost()}, seeds=1, scale=1.0)
    at = run.evaluated_at()
    assert at[-1] == steps
    assert at == sorted(set(at))
    assert len(at) == min(points, steps)
    assert max(after - before for before, after in zip([0, *at], at, strict=False)) <= math.ceil(steps / len(at)) + 1


def test_the_hash_of_a_run_changes_with_all_that_its_result_depends_on() -> None:
    def hashes(**changes: Any) -> set[str]:
        asked = study(**{"arms": {"a": {}}, **changes})
        return {run.hash for run in plan_runs(asked, {"a": cost()}, seeds=2, scale=1.0)}

    base = hashes()
    assert len(base) == 2
    assert base == hashes(figures=[], verdicts=[], question="another")
    arms = {"a": {"model.heads.init_args.num_horizons": 1}}
    for changes in ({"steps": 9}, {"points": 1}, {"arms": arms}, {"decode": None}, {"tests": {"t": {"data.x": 1}}}):
        assert not base & hashes(**changes)
