"""How deep to draft: as costs and acceptance say, with a clock of the test's own."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.decoders import CostAwareDepth, loop
from mtp_modules.decoders.drafting.policies import DepthChooser, _ByCost
from tests.drafting import clock

ROUNDS = 400


def run(chooser: DepthChooser, cost: Callable[[int], float], held: float, *, rows: int = 2, seed: int = 0) -> list[int]:
    """Play rounds in which a draft holds with a chance and a round takes what its depth costs."""
    generator, depths = torch.Generator().manual_seed(seed), []
    for _ in range(ROUNDS):
        depth = chooser.depth(rows)
        holds = torch.rand(rows, depth, generator=generator) < held
        accepted = holds.long().cumprod(dim=1).sum(dim=1).tolist()
        chooser.learn(rows, depth, accepted, [depth] * rows, cost(depth))
        depths.append(depth)
    return depths


def often(depths: list[int]) -> int:
    """Return the depth of most rounds of the second half."""
    late = depths[len(depths) // 2 :]
    return max(set(late), key=late.count)


def test_it_falls_back_to_plain_decoding_where_drafting_is_slow() -> None:
    depths = run(CostAwareDepth(explore_every=16).start(7), lambda depth: 1 + 3 * depth, held=0.6)
    assert often(depths) == 0
    late = depths[ROUNDS // 2 :]
    assert late.count(0) / len(late) >= 1 - 1 / 16 - 0.01  # all other rounds are tries


def test_it_drafts_deeper_the_more_often_drafts_hold() -> None:
    found = [often(run(CostAwareDepth().start(8), lambda depth: 1 + 0.1 * depth, held)) for held in (0.05, 0.5, 0.95)]
    assert found[0] < found[1] < found[2] == 8


def test_it_comes_back_once_drafting_pays() -> None:
    chooser = CostAwareDepth(memory=0.5, explore_every=4).start(4)
    assert often(run(chooser, lambda depth: 1 + 3 * depth, held=0.9)) == 0
    assert often(run(chooser, lambda depth: 1 + 0.02 * depth, held=0.9)) == 4


def test_times_are_kept_apart_for_each_number_of_rows() -> None:
    """Drafting that pays for one row may not pay for thirty-two."""
    chooser = CostAwareDepth().start(4)
    assert often(run(chooser, lambda depth: 1 + 0.02 * depth, held=0.8, rows=1)) == 4
    assert often(run(chooser, lambda depth: 1 + 2.0 * depth, held=0.8, rows=32)) == 0
    assert often(run(chooser, lambda depth: 1 + 0.02 * depth, held=0.8, rows=1)) == 4


def test_a_batch_whose_rows_end_is_not_tried_anew_each_time() -> None:
    """Drafts pay at every size, and each size costs its own time."""
    chooser = CostAwareDepth(explore_every=1000).start(4)
    run(chooser, lambda depth: 16 * (1 + 0.05 * depth), held=0.9, rows=16)
    found = []
    for rows in range(15, 0, -1):
        for _ in range(3):
            found.append(chooser.depth(rows))
            chooser.learn(rows, found[-1], [4] * rows, [4] * rows, rows * (1 + 0.05 * found[-1]))
    assert found == [4] * 45


def test_a_first_round_that_compiles_is_forgotten() -> None:
    chooser = CostAwareDepth().start(4)
    assert isinstance(chooser, _ByCost)
    depths = []
    for _ in range(6):
        depth = chooser.depth(2)
        chooser.learn(2, depth, [depth] * 2, [depth] * 2, 1.0 if depth in depths else 60.0)
        depths.append(depth)
    assert depths == [4, 2, 1, 0, 4, 4]
    assert chooser.seconds[2] == {4: 1.0, 2: 60.0, 1: 60.0, 0: 60.0}


@pytest.mark.parametrize("slower", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("slope", "best"), [(0.02, 4), (3.0, 0)])
def test_a_run_begins_with_what_the_last_one_has_learned(slope: float, best: int, slower: float) -> None:
    """Also where all rounds take longer than before, or are shorter."""
    policy = CostAwareDepth(explore_every=1000)
    first = run(policy.start(4), lambda depth: 1 + slope * depth, held=0.9)
    assert set(first) == {0, 1, 2, 4}
    assert set(run(policy.start(4), lambda depth: slower * (1 + slope * depth), held=0.9)) == {best}
    assert set(run(policy.start(3), lambda depth: 1 + slope * depth, held=0.9)) == {0, 1, 2, 3}  # has other choices


def test_runs_that_are_short_find_what_is_best_between_them() -> None:
    """Drafts begin to pay after many texts of ten rounds each."""
    policy = CostAwareDepth(memory=0.5, explore_every=16)
    for cost in (3.0, 0.02):
        for _ in range(60):
            chooser = policy.start(4)
            for _ in range(10):
                depth = chooser.depth(1)
                chooser.learn(1, depth, [depth], [depth], 1 + cost * depth)
        assert chooser.depth(1) == (0 if cost > 1 else 4)


@settings(max_examples=8)
@given(most=st.integers(1, 9), held=st.floats(0, 1), slope=st.floats(0, 3))
def test_it_stays_within_what_it_may_and_tries_everything_once(most: int, held: float, slope: float) -> None:
    depths = run(CostAwareDepth(explore_every=4).start(most), lambda depth: 1 + slope * depth, held)
    assert set(depths) <= {0, most, *(2**power for power in range(4))}
    assert {0, most} <= set(depths) <= set(range(most + 1))


@pytest.mark.parametrize("held", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("slope", [0.02, 0.2, 0.6])
def test_it_finds_the_depth_of_most_tokens_a_second(held: float, slope: float) -> None:
    def cost(depth: int) -> float:
        return 1 + slope * depth

    def speed(depth: int) -> float:
        return sum(held**place for place in range(depth + 1)) / cost(depth)

    found = often(run(CostAwareDepth(memory=0.97).start(8), cost, held, rows=16))
    assert speed(found) >= 0.95 * max(speed(depth) for depth in (0, 1, 2, 4, 8))


def test_one_slow_round_does_not_end_drafting() -> None:
    chooser = CostAwareDepth(explore_every=1000).start(4)
    run(chooser, lambda depth: 1 + 0.02 * depth, held=0.9)
    chooser.learn(2, 4, [4, 4], [4, 4], 100.0)  # the machine was busy
    assert chooser.depth(2) == 4


class Clock:
    """Time that passes only where the test says."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("draft", "deep"), [(5.0, False), (0.01, True)])
def test_a_decoder_follows_the_clock(draft: float, deep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All drafts are right, a forward pass takes a second, and a draft takes long or not."""
    time, model = Clock(), clock(5)
    monkeypatch.setattr(loop, "now", time)

    def passes(seconds: float) -> Callable[..., None]:
        return lambda *_: setattr(time, "seconds", time.seconds + seconds)

    model.trunk.layers[0].ffn_norm.register_forward_hook(passes(1.0))
    for head in model.heads.maps[1:]:
        head.register_forward_hook(passes(draft))
    decoder = SpeculativeDecoder(policy=CostAwareDepth(explore_every=16))
    rounds = list(decoder.stream(model, [[0]], max_new_tokens=120))
    drafted = [done.drafted[0] for done in rounds[1:]]
    usual = max(set(drafted), key=drafted.count)
    assert usual == (4 if deep else 0)
    tokens = [token for done in rounds for token in done.tokens[0]]
    assert tokens == AutoregressiveDecoder().generate(model, [[0]], max_new_tokens=120).tokens[0]
    if not deep:
        spent = sum(1 for number in drafted if number)
        assert spent <= math.ceil(len(drafted) / 16) + 4  # the first tries, and one now and then


def test_chances_are_conditional() -> None:
    """What counts at a depth is how often drafts hold there once those before them held, where they were verified."""
    chooser = CostAwareDepth(memory=0.0).start(3)
    assert isinstance(chooser, _ByCost)
    chooser.learn(4, 3, [0, 1, 2, 2], [3, 3, 3, 2], 1.0)
    assert chooser.acceptance == pytest.approx([3 / 4, 2 / 3, 0.0])
    chooser.learn(4, 3, [0, 0, 0, 0], [3, 3, 3, 3], 1.0)
    assert chooser.acceptance == pytest.approx([0.0, 2 / 3, 0.0])  # nothing was learned of deeper ones
