"""Beam search equals the naive one; drafts change how many forward passes it takes, and nothing else."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, MTPModel
from mtp_modules.decoders import (
    BeamDecoder,
    BeamGeneration,
    Decoder,
    DraftedBeamDecoder,
    JointBeamDecoder,
    StopRule,
)
from tests.beams import DECODERS, Letters, assert_same_beams, bigrams, noise
from tests.helpers import TRUNKS, TRUNKS_WITH_HEADS, VOCAB, assert_same, extend, make_model, random_tokens
from tests.reference.beam import beam_search, log_probs

TOKENS = st.integers(0, VOCAB - 1)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=3)
PENALTIES = st.sampled_from([0.0, 0.6, 1.0, 2.0])


def limit_positions(model: MTPModel, prompts: Sequence[Sequence[int]], data: st.DataObject) -> None:
    """Let the trunk read a little more than the longest prompt, or as much as it can."""
    room = data.draw(st.one_of(st.none(), st.integers(0, 6)), label="room")
    if room is not None:
        model.trunk.max_positions = max(map(len, prompts)) + room


def draw_case(
    data: st.DataObject, trunk: str, heads: str, horizons: int, *, ties: bool = True
) -> tuple[MTPModel, list[list[int]], Any]:
    model = make_model(trunk, heads, horizons, seed=data.draw(st.integers(0, 9), label="seed")).eval()
    # Flatter distributions than these models have make beams part more often, and drafts be accepted more often.
    with torch.no_grad():
        model.unembedding.weight.mul_(data.draw(st.sampled_from([0.1, 0.3, 1.0]), label="sharpness"))
        if ties and data.draw(st.booleans(), label="ties"):
            model.unembedding.weight[[3, 5]] = model.unembedding.weight[[7, 7]]  # the embedding's too
    prompts = data.draw(PROMPTS, label="prompts")
    budgets = data.draw(st.lists(st.integers(1, 8), min_size=len(prompts), max_size=len(prompts)), label="budgets")
    stop = data.draw(st.sets(TOKENS, max_size=3), label="stop")
    limit_positions(model, prompts, data)
    return model, prompts, {"max_new_tokens": budgets, "stop": StopRule(tokens=stop)}


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@settings(max_examples=settings.default.max_examples // 8)
@given(data=st.data())
def test_plain_beam_search_equals_the_naive_one(trunk: str, heads: str, data: st.DataObject) -> None:
    model, prompts, options = draw_case(data, trunk, heads, 1)
    num_beams, penalty = data.draw(st.integers(1, 4), label="beams"), data.draw(PENALTIES, label="penalty")
    decoder = BeamDecoder(num_beams=num_beams, length_penalty=penalty)
    generation = decoder.generate(model, prompts, **options)
    for prompt, budget, beams in zip(prompts, options["max_new_tokens"], generation.beams, strict=True):
        expected = beam_search(
            model,
            prompt,
            num_beams=num_beams,
            length_penalty=penalty,
            max_new_tokens=budget,
            stop_tokens=options["stop"].tokens,
        )
        assert_same_beams(beams, expected)
        for beam in beams:
            assert math.isclose(beam.score, beam.log_probability / len(beam.tokens) ** penalty, rel_tol=1e-12)
    assert generation.tokens == [beams[0].tokens for beams in generation.beams]
    assert generation.finish_reasons == [beams[0].finish_reason for beams in generation.beams]
    assert generation.stats.drafted == generation.stats.accepted == []


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@settings(max_examples=settings.default.max_examples // 6)
@given(data=st.data())
def test_drafts_leave_beams_and_scores_as_they_are(trunk: str, heads: str, data: st.DataObject) -> None:
    horizons = data.draw(st.integers(2, 5), label="H")
    model, prompts, options = draw_case(data, trunk, heads, horizons)
    shared = {
        "num_beams": data.draw(st.integers(1, 4), label="beams"),
        "length_penalty": data.draw(PENALTIES, label="penalty"),
    }
    num_drafts = data.draw(st.one_of(st.none(), st.integers(1, horizons - 1)), label="K")
    num_paths = data.draw(st.one_of(st.none(), st.integers(shared["num_beams"], VOCAB)), label="paths")
    plain = BeamDecoder(**shared).generate(model, prompts, **options)
    drafted = DraftedBeamDecoder(**shared, num_drafts=num_drafts, num_paths=num_paths).generate(
        model, prompts, **options
    )
    for found, expected in zip(drafted.beams, plain.beams, strict=True):
        assert_same_beams(found, expected)
    assert drafted.stats.forwards <= plain.stats.forwards
    assert drafted.stats.forwards + sum(drafted.stats.accepted) == plain.stats.forwards


@pytest.mark.parametrize("trunk", TRUNKS)
@settings(max_examples=settings.default.max_examples // 4)
@given(data=st.data())
def test_wide_drafts_save_forward_passes_on_any_model(trunk: str, data: st.DataObject) -> None:
    """With as many paths as tokens, one beam's first step is always drafted; so no two passes take one step each."""
    model = make_model(trunk, "recurrent", 3, seed=data.draw(st.integers(0, 9), label="seed")).eval()
    plain = BeamDecoder(num_beams=1).generate(model, [[1, 2]], max_new_tokens=9)
    drafted = DraftedBeamDecoder(num_beams=1, num_drafts=1, num_paths=VOCAB).generate(model, [[1, 2]], max_new_tokens=9)
    assert drafted.tokens == plain.tokens
    assert (plain.stats.forwards, drafted.stats.forwards) == (9, 5)


@pytest.mark.parametrize("num_beams", [1, 2, 3, 4])
@pytest.mark.parametrize("num_drafts", [1, 3, 4])
def test_a_model_that_drafts_well_needs_few_forward_passes(num_beams: int, num_drafts: int) -> None:
    model, prompts = bigrams(noise(1.5), 5), [[0], [3, 4], [9, 2, 5]]
    plain = BeamDecoder(num_beams=num_beams).generate(model, prompts, max_new_tokens=11)
    drafted = DraftedBeamDecoder(num_beams=num_beams, num_drafts=num_drafts).generate(model, prompts, max_new_tokens=11)
    for found, expected in zip(drafted.beams, plain.beams, strict=True):
        assert_same_beams(found, expected)
    assert plain.stats.forwards == 11 * len(prompts)
    assert drafted.stats.forwards == (1 + math.ceil(10 / (num_drafts + 1))) * len(prompts)


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@settings(max_examples=settings.default.max_examples // 3)
@given(data=st.data())
def test_the_search_over_blocks_equals_the_naive_one(trunk: str, heads: str, data: st.DataObject) -> None:
    horizons = data.draw(st.integers(2, 4), label="H")
    model, prompts, options = draw_case(data, trunk, heads, horizons, ties=False)
    shared = {
        "num_beams": data.draw(st.integers(1, 3), label="beams"),
        "length_penalty": data.draw(PENALTIES, label="penalty"),
        "num_drafts": data.draw(st.integers(1, horizons - 1), label="K"),
    }
    num_blocks = data.draw(st.integers(shared["num_beams"], 6), label="blocks")
    generation = JointBeamDecoder(**shared, num_blocks=num_blocks).generate(model, prompts, **options)
    for prompt, budget, beams in zip(prompts, options["max_new_tokens"], generation.beams, strict=True):
        expected = beam_search(
            model,
            prompt,
            max_new_tokens=budget,
            stop_tokens=options["stop"].tokens,
            num_blocks=num_blocks,
            **shared,
        )
        assert_same_beams(beams, expected)


@pytest.mark.parametrize("decoder", DECODERS)
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_a_prompt_has_the_beams_that_it_has_alone(decoder: Decoder, data: st.DataObject) -> None:
    trunk = data.draw(st.sampled_from(["transformer_previous", "gru"]), label="trunk")
    model, prompts, options = draw_case(data, trunk, "recurrent", 4)
    together = decoder.generate(model, prompts, **options)
    assert isinstance(together, BeamGeneration)
    for row, prompt in enumerate(prompts):
        alone = decoder.generate(model, [prompt], max_new_tokens=options["max_new_tokens"][row], stop=options["stop"])
        assert isinstance(alone, BeamGeneration)
        assert_same_beams(together.beams[row], alone.beams[0])


@pytest.mark.parametrize("decoder", DECODERS)
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_a_letter_ends_a_beam_as_its_token_does(decoder: Decoder, data: st.DataObject) -> None:
    """Beams of one parent look for strings each in its own text; so do the blocks behind one beam."""
    model, prompts, options = draw_case(data, "gru", "recurrent", 4)
    tokens = sorted(options["stop"].tokens)
    letters = StopRule(strings=[Letters().decode([token]) for token in tokens], tokenizer=Letters())
    by_token = decoder.generate(model, prompts, **options)
    by_letter = decoder.generate(model, prompts, max_new_tokens=options["max_new_tokens"], stop=letters)
    assert isinstance(by_token, BeamGeneration)
    assert isinstance(by_letter, BeamGeneration)
    assert by_letter.beams == by_token.beams
    assert by_letter.stats.accepted == by_token.stats.accepted


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_string_of_two_letters_is_looked_for_in_each_beam_s_own_text(decoder: Decoder) -> None:
    """The first letters of two beams, one after the other, are a string that neither of them has."""
    stopped = 0
    for seed in range(8):
        model = make_model("gru", "recurrent", 4, seed=seed)
        with torch.no_grad():
            model.unembedding.weight.mul_(0.1)
        free = decoder.generate(model, [[1, 2]], max_new_tokens=6)
        assert isinstance(free, BeamGeneration)
        for one, other in itertools.permutations([beam.tokens for beam in free.beams[0]], 2):
            string = Letters().decode([one[0], other[0]])
            rule = StopRule(strings=[string], tokenizer=Letters())
            found = decoder.generate(model, [[1, 2]], max_new_tokens=6, stop=rule)
            assert isinstance(found, BeamGeneration)
            for beam in found.beams[0]:
                text = Letters().decode(beam.tokens)
                assert (string in text) == text.endswith(string) == (beam.finish_reason == "stop")
                stopped += beam.finish_reason == "stop"
    assert stopped


@pytest.mark.parametrize("trunk", TRUNKS)
def test_one_beam_is_greedy_decoding(trunk: str) -> None:
    model, prompts = make_model(trunk, "parallel", 3).eval(), [[3], [1, 2, 3, 4], [5, 6]]
    greedy = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=14, stop=StopRule(tokens=[7]))
    for decoder in (BeamDecoder(num_beams=1), DraftedBeamDecoder(num_beams=1)):
        generation = decoder.generate(model, prompts, max_new_tokens=14, stop=StopRule(tokens=[7]))
        assert (generation.tokens, generation.finish_reasons) == (greedy.tokens, greedy.finish_reasons)


def test_as_many_beams_as_tokens_find_the_most_likely_pairs_of_all() -> None:
    model = make_model("gru", "linear", 1).eval()
    first = log_probs(model, [1, 2])
    pairs = {(a, b): float(first[a] + log_probs(model, [1, 2, a])[b]) for a in range(VOCAB) for b in range(VOCAB)}
    most_likely = sorted(pairs, key=lambda pair: -pairs[pair])[:VOCAB]
    beams = BeamDecoder(num_beams=VOCAB).generate(model, [[1, 2]], max_new_tokens=2).beams[0]
    assert [tuple(beam.tokens) for beam in beams] == most_likely
    assert_same(torch.tensor([beam.log_probability for beam in beams]), torch.tensor([pairs[p] for p in most_likely]))


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 1], [2, 2], [1, 0, 2, 0]], ids=str)
def test_a_row_selected_twice_equals_two_rows_that_read_the_same(trunk: str, heads: str, rows: list[int]) -> None:
    """It becomes two rows, and what one of them reads later does not show in the other."""
    model = make_model(trunk, heads, 3).eval()
    prompt, keep = random_tokens(3, 4), [4, 1, 3]
    states = model.trunk.new_state(3, 12), model.heads.new_state(3, 12)
    extend(model, prompt, *states)
    for state in states:
        state.commit(keep)
        state.select(rows)
    texts = [prompt[row, : keep[row]].tolist() for row in rows]
    for seed, kept in ((1, [2 - index % 2 for index in range(len(rows))]), (2, [2] * len(rows))):
        chunk = random_tokens(len(rows), 2, seed=seed)
        assert states[0].lengths == states[1].lengths == [len(text) for text in texts]
        _, first = extend(model, chunk, *states)
        for index, text in enumerate(texts):
            whole = [*text, *chunk[index].tolist()]
            assert_same(first[index], model(torch.tensor([[*whole, 0, 0, 0]]))[0][0, len(text) :])
            text.extend(chunk[index, : kept[index]].tolist())
        for state in states:
            state.commit(kept)
    token = torch.full((len(rows),), 5)
    draft = model.heads.draft(
        token, states[1], num_drafts=2, embed=model.trunk.embedding, unembed=model.unembedding.logits
    )
    for index, text in enumerate(texts):
        predicted = model(torch.tensor([[*text, 5, *draft.tokens[index].tolist()]]))
        for depth in (0, 1):
            expected = model.unembedding.logits(predicted[depth + 1][0, len(text) - 1], depth + 1)
            assert_same(draft.logits[index, depth], expected)
