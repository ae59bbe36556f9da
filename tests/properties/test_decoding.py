"""Plain decoding equals reading everything again for every token; speculative decoding equals plain decoding."""

from collections.abc import Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.decoders import DecodingStats, Generation, StopRule
from tests.drafting import ScriptedHeads, clock, copying_script
from tests.helpers import TRUNKS, TRUNKS_WITH_EVERY_HEADS, VOCAB, make_model
from tests.reference.decoding import decode

TOKENS = st.integers(0, VOCAB - 1)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=7), min_size=1, max_size=4)


def plain(model: MTPModel, prompts: Sequence[Sequence[int]], budget: int, stop: Collection[int] = ()) -> Generation:
    return AutoregressiveDecoder().generate(model, prompts, max_new_tokens=budget, stop=StopRule(tokens=stop))


def assert_same_output(actual: Generation, expected: Generation) -> None:
    assert actual.tokens == expected.tokens
    assert actual.finish_reasons == expected.finish_reasons


def limit_positions(model: MTPModel, prompts: Sequence[Sequence[int]], data: st.DataObject) -> None:
    """Let the trunk read a little more than the longest prompt, or as much as it can."""
    room = data.draw(st.one_of(st.none(), st.integers(0, 12)), label="room")
    if room is not None:
        model.trunk.max_positions = max(map(len, prompts)) + room


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
@settings(max_examples=settings.default.max_examples // 8)
@given(data=st.data())
def test_plain_decoding_equals_the_naive_loop(trunk: str, heads: str, data: st.DataObject) -> None:
    model = make_model(trunk, heads, data.draw(st.integers(1, 3), label="H"), seed=data.draw(st.integers(0, 9))).eval()
    prompts = data.draw(PROMPTS, label="prompts")
    budget = data.draw(st.integers(1, 12), label="budget")
    stop = data.draw(st.sets(TOKENS, max_size=2), label="stop")
    limit_positions(model, prompts, data)
    generation = plain(model, prompts, budget, stop)
    for prompt, tokens, reason in zip(prompts, generation.tokens, generation.finish_reasons, strict=True):
        assert (tokens, reason) == decode(model, prompt, max_new_tokens=budget, stop_tokens=stop)
    assert generation.stats.tokens_per_forward == 1.0
    assert generation.stats.drafted == generation.stats.accepted == []


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
@settings(max_examples=settings.default.max_examples // 6)
@given(data=st.data())
def test_speculative_decoding_equals_plain_decoding(trunk: str, heads: str, data: st.DataObject) -> None:
    num_horizons = data.draw(st.integers(2, 5), label="H")
    model = make_model(trunk, heads, num_horizons, seed=data.draw(st.integers(0, 9), label="seed")).eval()
    prompts = data.draw(PROMPTS, label="prompts")
    budget = data.draw(st.integers(1, 14), label="budget")
    stop = data.draw(st.sets(TOKENS, max_size=2), label="stop")
    limit_positions(model, prompts, data)
    expected = plain(model, prompts, budget, stop)
    num_drafts = data.draw(st.one_of(st.none(), st.integers(1, num_horizons - 1)), label="K")
    decoder = SpeculativeDecoder(num_drafts=num_drafts)
    assert_same_output(decoder.generate(model, prompts, max_new_tokens=budget, stop=StopRule(tokens=stop)), expected)


@pytest.mark.parametrize("trunk", TRUNKS)
@settings(max_examples=settings.default.max_examples // 4)
@given(data=st.data())
def test_partly_right_drafts_change_nothing_and_are_counted_exactly(trunk: str, data: st.DataObject) -> None:
    """Any pattern of right and wrong drafts, which random heads would not bring."""
    num_horizons = data.draw(st.integers(2, 5), label="H")
    model = make_model(trunk, "parallel", num_horizons, seed=data.draw(st.integers(0, 9), label="seed")).eval()
    prompts = data.draw(PROMPTS, label="prompts")
    budget = data.draw(st.integers(1, 14), label="budget")
    outputs = plain(model, prompts, budget + num_horizons).tokens
    stop = data.draw(st.sets(st.sampled_from(sorted({t for row in outputs for t in row})), max_size=2), label="stop")
    limit_positions(model, prompts, data)
    expected = plain(model, prompts, budget, stop)

    wrong = data.draw(st.sets(st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 15))), label="wrong")
    scripted = ScriptedHeads(heads=model.heads, script=copying_script(prompts, outputs, lambda *at: at in wrong))
    model.heads = scripted
    rounds, stats = [], DecodingStats()
    for done in SpeculativeDecoder().stream(model, prompts, max_new_tokens=budget, stop=StopRule(tokens=stop)):
        rounds.append(done)
        stats.count(done)

    tokens: list[list[int]] = [[] for _ in prompts]
    forwards, drafted, accepted, drafts = (
        0,
        [0] * stats_depth(rounds),
        [0] * stats_depth(rounds),
        iter(scripted.drafted),
    )
    alive = set(range(len(prompts)))
    for done in rounds:
        assert set(done.rows) == alive, "a row takes part until it ends, and not a round longer"
        drafts_of = next(drafts) if any(done.drafted) else {}
        everything = zip(done.rows, done.tokens, done.accepted, done.drafted, done.finish_reasons, strict=True)
        for row, new, used, counted, reason in everything:
            forwards += 1
            proposed = drafts_of.get(row, [])[:counted]
            assert len(proposed) == counted
            right = 0
            while right < min(len(proposed), len(new)) and proposed[right] == new[right]:
                right += 1
            assert used == right
            for depth in range(counted):
                drafted[depth] += 1
                accepted[depth] += right > depth
            tokens[row] += new
            if reason is not None:
                assert reason == expected.finish_reasons[row]
                alive.remove(row)
    assert not alive
    assert tokens == expected.tokens
    assert (stats.tokens, stats.forwards) == (sum(map(len, tokens)), forwards)
    assert (stats.drafted, stats.accepted) == (drafted, accepted)


def stats_depth(rounds: Sequence) -> int:
    return max(max(done.drafted) for done in rounds)


@pytest.mark.parametrize("trunk", TRUNKS)
@settings(max_examples=settings.default.max_examples // 6)
@given(data=st.data())
def test_a_row_of_a_batch_decodes_as_it_does_alone(trunk: str, data: st.DataObject) -> None:
    model = make_model(trunk, "parallel", 4, seed=data.draw(st.integers(0, 9), label="seed")).eval()
    prompts = data.draw(PROMPTS, label="prompts")
    stop = data.draw(st.sets(TOKENS, max_size=1), label="stop")
    limit_positions(model, prompts, data)
    together = SpeculativeDecoder().generate(model, prompts, max_new_tokens=9, stop=StopRule(tokens=stop))
    for row, prompt in enumerate(prompts):
        alone = SpeculativeDecoder().generate(model, [prompt], max_new_tokens=9, stop=StopRule(tokens=stop))
        assert (alone.tokens[0], alone.finish_reasons[0]) == (together.tokens[row], together.finish_reasons[row])


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
def test_copied_drafts_are_all_accepted(trunk: str, heads: str) -> None:
    num_drafts = 3
    model = make_model(trunk, heads, num_drafts + 1).eval()
    prompts, budget = [[3], [1, 2, 3, 4], [5, 6]], 3 * (num_drafts + 1) + 1  # the prompt's pass, and three full blocks
    expected = plain(model, prompts, budget)
    model.heads = ScriptedHeads(
        heads=model.heads, script=copying_script(prompts, expected.tokens, lambda row, place: False)
    )
    generation = SpeculativeDecoder().generate(model, prompts, max_new_tokens=budget)
    assert_same_output(generation, expected)
    assert generation.stats.forwards == 4 * len(prompts)
    assert generation.stats.acceptance == [1.0] * num_drafts
    assert generation.stats.tokens_per_forward == budget / 4


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
def test_adversarial_drafts_are_never_accepted(trunk: str, heads: str) -> None:
    model = make_model(trunk, heads, 4).eval()
    prompts, budget = [[3], [1, 2, 3, 4], [5, 6]], 14
    expected = plain(model, prompts, budget)
    model.heads = ScriptedHeads(
        heads=model.heads, script=copying_script(prompts, expected.tokens, lambda row, place: True)
    )
    generation = SpeculativeDecoder().generate(model, prompts, max_new_tokens=budget)
    assert_same_output(generation, expected)
    assert generation.stats.tokens_per_forward == 1.0
    assert generation.stats.acceptance == [0.0] * 3


@pytest.mark.parametrize("stop", range(VOCAB))
@pytest.mark.parametrize("num_drafts", [1, 3, 4])
def test_a_stop_token_ends_a_row_at_every_place_of_a_block(stop: int, num_drafts: int) -> None:
    model, prompts = clock(5), [[0], [3, 4], [9]]
    decoder = SpeculativeDecoder(num_drafts=num_drafts)
    generation = decoder.generate(model, prompts, max_new_tokens=VOCAB, stop=StopRule(tokens=[stop]))
    counted = [(stop - prompt[-1] - 1) % VOCAB + 1 for prompt in prompts]
    assert generation.tokens == [
        [(prompt[-1] + place) % VOCAB for place in range(1, count + 1)]
        for prompt, count in zip(prompts, counted, strict=True)
    ]
    assert generation.finish_reasons == ["stop"] * len(prompts)
    assert_same_output(generation, plain(model, prompts, VOCAB, [stop]))


@pytest.mark.parametrize("budget", range(1, 12))
@pytest.mark.parametrize("num_drafts", [1, 4])
def test_a_budget_ends_a_row_at_every_place_of_a_block(budget: int, num_drafts: int) -> None:
    model, prompts = clock(5), [[0], [3, 4]]
    generation = SpeculativeDecoder(num_drafts=num_drafts).generate(model, prompts, max_new_tokens=budget)
    assert [len(tokens) for tokens in generation.tokens] == [budget, budget]
    assert generation.finish_reasons == ["length", "length"]
    assert_same_output(generation, plain(model, prompts, budget))


def test_a_stop_token_beyond_the_budget_does_not_count() -> None:
    generation = SpeculativeDecoder().generate(clock(5), [[0]], max_new_tokens=4, stop=StopRule(tokens=[5]))
    assert (generation.tokens, generation.finish_reasons) == ([[1, 2, 3, 4]], ["length"])


@pytest.mark.parametrize("length", range(1, 13))
def test_the_last_position_ends_a_row(length: int) -> None:
    """A trunk of 12 positions reads 12 tokens and says one more."""
    model, prompts = clock(5), [list(range(length)), [0]]
    prompts[0] = [token % VOCAB for token in prompts[0]]
    model.trunk.max_positions = 12
    generation = SpeculativeDecoder().generate(model, prompts, max_new_tokens=99)
    assert [len(tokens) for tokens in generation.tokens] == [13 - length, 12]
    assert generation.finish_reasons == ["context", "context"]
    assert_same_output(generation, plain(model, prompts, 99))


@pytest.mark.parametrize("hands", [(1, 2, 3, 4), (1, 3, 3, 4), (1, 2, 5, 4), (1, 2, 3, 9), (1, 3, 4, 5)], ids=str)
def test_real_heads_are_accepted_up_to_the_first_that_is_wrong(hands: tuple[int, ...]) -> None:
    right = next((depth for depth, hand in enumerate(hands) if hand != depth + 1), 4) - 1
    generation = SpeculativeDecoder().generate(clock(4, hands=hands), [[0], [1, 2, 3]], max_new_tokens=1 + 8 * 12)
    assert generation.tokens[0] == [place % VOCAB for place in range(1, 98)]
    full_blocks = 96 // (right + 1)
    assert generation.stats.forwards == 2 * (1 + full_blocks)
    assert generation.stats.accepted[:right] == generation.stats.drafted[:right]
    assert generation.stats.accepted[right:] == [0] * (3 - right)
