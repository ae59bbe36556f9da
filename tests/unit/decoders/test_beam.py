"""Beam decoders as their users meet them: ties, ends, streams, what is rejected."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mtp_modules import build, describe
from mtp_modules.decoders import (
    Beam,
    BeamDecoder,
    BeamGeneration,
    Decoder,
    DecodingStats,
    DraftedBeamDecoder,
    JointBeamDecoder,
    SamplingParams,
    StopRule,
)
from mtp_modules.decoders.beam.tensors import BeamTensors, largest
from mtp_modules.decoders.beam.trees import Drafts
from tests.beams import DECODERS, Letters, assert_same_beams, bigrams, noise
from tests.drafting import clock
from tests.helpers import VOCAB, assert_same, make_model
from tests.reference.beam import beam_search


def beams_of(decoder: Decoder, *arguments: Any, **options: Any) -> list[list[Beam]]:
    generation = decoder.generate(*arguments, **options)
    assert isinstance(generation, BeamGeneration)
    return generation.beams


def test_the_search_over_blocks_emits_a_block_and_a_token_each_forward_pass() -> None:
    model = make_model("gru", "parallel", 4).eval()
    generation = JointBeamDecoder(num_beams=2).generate(model, [[1, 2], [3]], max_new_tokens=13)
    assert generation.stats.forwards == 2 * (1 + 12 // 4)
    assert generation.stats.accepted == generation.stats.drafted == [2 * 3] * 3


def test_the_search_over_blocks_loses_what_the_heads_do_not_propose() -> None:
    """Heads that turn the clock too far propose no other block, and the model can only score it as unlikely."""
    model = clock(2, hands=[1, 5])
    exact = BeamDecoder(num_beams=1).generate(model, [[0]], max_new_tokens=3)
    lossy = JointBeamDecoder(num_beams=1, num_blocks=1).generate(model, [[0]], max_new_tokens=3)
    assert (exact.tokens, lossy.tokens) == ([[1, 2, 3]], [[1, 5, 6]])
    assert lossy.beams[0][0].log_probability < exact.beams[0][0].log_probability


@pytest.mark.parametrize("decoder", DECODERS[:2])
def test_ties_go_by_the_smaller_token_then_by_the_older_beam(decoder: Decoder) -> None:
    """A model that finds all tokens equally likely, up to a rounding that must not count."""
    model = bigrams(noise(1e-12), 3)
    generation = decoder.generate(model, [[4]], max_new_tokens=3, stop=StopRule(tokens=[1]))
    assert isinstance(generation, BeamGeneration)
    # Of [0], [1] and [2], the stop token ends the second; then it costs less than all that goes on.
    assert [beam.tokens for beam in generation.beams[0]] == [[1], [0, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize("size", [4, 40, 400])
def test_of_equal_values_the_first_are_the_largest(size: int) -> None:
    values = torch.zeros(2, size)
    values[0, 3] = 1
    found, places = largest(values, 3)
    assert found.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert places.tolist() == [[3, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_tie_do_not_depend_on_neighbours(decoder: Decoder, seed: int) -> None:
    """The heads find three tokens exactly as likely as one another."""
    model = make_model("gru", "recurrent", 4, seed=seed).eval()
    with torch.no_grad():
        model.unembedding.weight[[3, 5]] = model.unembedding.weight[[7, 7]]
        model.unembedding.weight.mul_(0.1)
    prompts = [[1, 2], [3], [8, 8, 4], [6]]
    together = beams_of(decoder, model, prompts, max_new_tokens=8)
    for prompt, beams in zip(prompts, together, strict=True):
        assert_same_beams(beams, beams_of(decoder, model, [prompt], max_new_tokens=8)[0])


@pytest.mark.parametrize("decoder", DECODERS[:2])
def test_a_finished_beam_keeps_its_place_and_a_length_penalty_may_overtake_it(decoder: Decoder) -> None:
    logits = torch.full((VOCAB, VOCAB), -40.0, dtype=torch.float64)
    logits[0, 1], logits[0, 2], logits[2, 3], logits[3, 3] = math.log(0.6), math.log(0.4), 0.0, 0.0
    model, found = bigrams(logits), []
    for penalty in (0.0, 1.0):
        own = type(decoder)(num_beams=2, length_penalty=penalty)
        generation = own.generate(model, [[0]], max_new_tokens=3, stop=StopRule(tokens=[1]))
        found.append([(beam.tokens, beam.finish_reason) for beam in generation.beams[0]])
        scores = [math.log(0.6), math.log(0.4) / 3**penalty]
        assert [beam.score for beam in generation.beams[0]] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    short, long = ([1], "stop"), ([2, 3, 3], "length")
    assert found == [[short, long], [long, short]]


@pytest.mark.parametrize("decoder", DECODERS)
def test_only_allowed_tokens_are_in_beams(decoder: Decoder) -> None:
    model = make_model("lstm", "recurrent", 3).eval()
    params = [SamplingParams(allowed_tokens=[2, 5, 7]), SamplingParams(), SamplingParams(allowed_tokens=[4])]
    prompts = [[1, 2], [3], [8, 8]]
    generation = decoder.generate(model, prompts, max_new_tokens=5, sampling=params)
    assert isinstance(generation, BeamGeneration)
    assert {token for beam in generation.beams[0] for token in beam.tokens} <= {2, 5, 7}
    assert [beam.tokens for beam in generation.beams[2]] == [[4] * 5]  # no other text is possible
    assert generation.beams[2][0].log_probability == pytest.approx(0.0, abs=1e-12)
    free = decoder.generate(model, prompts[1:2], max_new_tokens=5)
    assert isinstance(free, BeamGeneration)
    assert_same_beams(generation.beams[1], free.beams[0])
    if isinstance(decoder, BeamDecoder):
        expected = beam_search(model, [1, 2], num_beams=3, max_new_tokens=5, allowed=[2, 5, 7])
        assert_same_beams(generation.beams[0], expected)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("others", [[], [[3]], [[3], [8, 8]]], ids=len)
def test_drafts_that_are_not_allowed_leave_the_beams_of_plain_search(decoder: Decoder, others: list[list[int]]) -> None:
    """Also when the neighbours, whose drafts are allowed, have ended."""
    model = make_model("gru", "recurrent", 3, draft_tokens=[4, 6, 7]).eval()
    params = SamplingParams(allowed_tokens=[2, 5, 10])
    (alone,) = beams_of(BeamDecoder(num_beams=3), model, [[1, 2]], max_new_tokens=6, sampling=params)
    found = beams_of(
        decoder,
        model,
        [[1, 2], *others],
        max_new_tokens=[6, 3, 4][: 1 + len(others)],
        sampling=[params, *[SamplingParams()] * len(others)],
    )
    assert_same_beams(found[0], alone)


@pytest.mark.parametrize("decoder", [DraftedBeamDecoder(num_beams=1), JointBeamDecoder(num_beams=1, num_blocks=VOCAB)])
@pytest.mark.parametrize("logit", [-math.inf, math.nan])
def test_heads_without_a_possible_token_leave_the_beams_of_plain_search(
    decoder: Decoder, logit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head for horizon 3 finds all tokens impossible, so there is no whole block.

    Every first draft is read, so a round has two steps, and an even budget never asks for a shorter block.
    """
    model = bigrams(noise(1.0), 3)
    logits = model.unembedding.logits

    def without_horizon_3(states: torch.Tensor, horizon_index: int = 0) -> torch.Tensor:
        known = logits(states, horizon_index)
        return torch.full_like(known, logit) if horizon_index == 2 else known

    monkeypatch.setattr(model.unembedding, "logits", without_horizon_3)
    expected = beams_of(BeamDecoder(num_beams=1), model, [[1, 2], [3]], max_new_tokens=[6, 14])
    found = beams_of(decoder, model, [[1, 2], [3]], max_new_tokens=[6, 14])
    for own, others in zip(found, expected, strict=True):
        assert_same_beams(own, others)


@pytest.mark.parametrize("decoder", [DraftedBeamDecoder(num_beams=2, num_paths=8), JointBeamDecoder(num_beams=3)])
def test_no_path_is_drafted_twice(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted: list[Drafts] = []
    draft = BeamTensors.draft

    def kept(self: BeamTensors, depth: int) -> Drafts:
        drafted.append(draft(self, depth))
        return drafted[-1]

    monkeypatch.setattr(BeamTensors, "draft", kept)
    model = make_model("gru", "recurrent", 4).eval()
    decoder.generate(model, [[1, 2], [3]], max_new_tokens=9, sampling=SamplingParams(allowed_tokens=[1, 2]))
    assert drafted
    for tokens, parents, possible in drafted:
        for place in np.ndindex(tokens.shape[:2]):
            found = list(zip(tokens[place][possible[place]], parents[place][possible[place]], strict=True))
            assert len(set(found)) == len(found) > 0


@pytest.mark.parametrize("penalty", [300.0, 1e6])
def test_a_penalty_that_overflows_makes_all_scores_alike(penalty: float) -> None:
    beams = beams_of(BeamDecoder(num_beams=2, length_penalty=penalty), bigrams(noise(1.0)), [[1]], max_new_tokens=14)
    assert [len(beam.tokens) for beam in beams[0]] == [14, 14]
    assert all(beam.score == pytest.approx(0, abs=1e-300) for beam in beams[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_nor_does_it_let_in_tokens_that_are_not_allowed(decoder: Decoder) -> None:
    params = SamplingParams(allowed_tokens=[2, 7])
    own = type(decoder)(num_beams=2, length_penalty=300.0)
    beams = beams_of(own, bigrams(noise(1.0)), [[1], [3, 4]], max_new_tokens=[14, 20], sampling=params)
    assert [[len(beam.tokens) for beam in found] for found in beams] == [[14, 14], [20, 20]]
    assert {token for found in beams for beam in found for token in beam.tokens} <= {2, 7}


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_beam_watches_for_strings_in_its_own_text(decoder: Decoder) -> None:
    model = make_model("transformer", "recurrent", 4).eval()
    with torch.no_grad():
        model.unembedding.weight.mul_(0.1)
    free = decoder.generate(model, [[1]], max_new_tokens=6)
    string = Letters().decode(free.tokens[0][2:4])
    generation = decoder.generate(model, [[1]], max_new_tokens=6, stop=StopRule(strings=[string], tokenizer=Letters()))
    assert isinstance(generation, BeamGeneration)
    assert any(beam.finish_reason == "stop" for beam in generation.beams[0])
    for beam in generation.beams[0]:
        place = Letters().decode(beam.tokens).find(string)
        assert (place + 2 == len(beam.tokens)) if beam.finish_reason == "stop" else place < 0


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_emits_what_all_beams_agree_on_and_at_last_the_best(decoder: Decoder) -> None:
    model, prompts = make_model("gru", "recurrent", 4).eval(), [[1], [2, 3], [4, 5, 6]]
    options: dict[str, Any] = {"max_new_tokens": [9, 5, 7], "stop": StopRule(tokens=[1])}
    tokens: list[list[int]] = [[], [], []]
    reasons, stats = [""] * 3, DecodingStats()
    for done in decoder.stream(model, prompts, **options):
        assert not torch.is_inference_mode_enabled()
        stats.count(done)
        for row, new, reason in zip(done.rows, done.tokens, done.finish_reasons, strict=True):
            assert not reasons[row], "a prompt takes part until it ends"
            tokens[row] += new
            reasons[row] = reason or ""
    generation = decoder.generate(model, prompts, **options)
    assert (tokens, reasons) == (generation.tokens, generation.finish_reasons)
    assert (stats.tokens, stats.forwards, stats.accepted) == (
        generation.stats.tokens,
        generation.stats.forwards,
        generation.stats.accepted,
    )
    assert generation.stats.seconds > 0


def test_a_stream_emits_tokens_as_soon_as_all_beams_agree() -> None:
    logits = torch.full((VOCAB, VOCAB), -40.0, dtype=torch.float64)
    for token in range(VOCAB):
        logits[token, (token + 1) % VOCAB] = 0.0
    logits[6, 8] = logits[7, 9] = 0.0
    # The two beams part at the last token, until the second may go on over 7 or 8; over 7 it is half as likely to.
    rounds = list(BeamDecoder(num_beams=2).stream(bigrams(logits), [[3]], max_new_tokens=5))
    assert [done.tokens[0] for done in rounds] == [[], [4], [5], [6], [8, 9]]


@pytest.mark.parametrize("decoder", DECODERS)
def test_beam_search_never_changes_the_model(decoder: Decoder) -> None:
    model = make_model("transformer", "recurrent", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder.generate(model, [[1, 2]], max_new_tokens=5)
    assert not any(module.training for module in model.modules())
    assert_same(model.state_dict(), before, tolerance=0)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_describes_itself(decoder: Decoder) -> None:
    assert describe(build(describe(decoder))) == describe(decoder)


BUILT_WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no beam": (lambda: BeamDecoder(num_beams=0), "BeamDecoder: num_beams must be at least 1, got 0."),
    "a negative penalty": (
        lambda: JointBeamDecoder(length_penalty=-1.0),
        "JointBeamDecoder: length_penalty must be at least 0, got -1.0.",
    ),
    "no number": (
        lambda: BeamDecoder(length_penalty=math.nan),
        "BeamDecoder: length_penalty must be at least 0, got nan.",
    ),
    "an infinite penalty": (
        lambda: BeamDecoder(length_penalty=math.inf),
        "BeamDecoder: length_penalty must be a finite number, got inf.",
    ),
    "no draft": (
        lambda: DraftedBeamDecoder(num_drafts=0),
        "DraftedBeamDecoder: num_drafts must be at least 1, got 0.",
    ),
    "no token of a block": (
        lambda: JointBeamDecoder(num_drafts=0),
        "JointBeamDecoder: num_drafts must be at least 1, got 0.",
    ),
    "fewer paths than beams": (
        lambda: DraftedBeamDecoder(num_beams=3, num_paths=2),
        "DraftedBeamDecoder: num_paths must be at least num_beams (3), got 2.",
    ),
    "fewer blocks than beams": (
        lambda: JointBeamDecoder(num_beams=3, num_blocks=2),
        "JointBeamDecoder: num_blocks must be at least num_beams (3), got 2.",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), BUILT_WRONG.values(), ids=BUILT_WRONG)
def test_bad_arguments_are_rejected(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make()


USED_WRONG: dict[str, tuple[Decoder, dict[str, Any], str]] = {
    "more beams than tokens": (
        BeamDecoder(num_beams=12),
        {},
        "BeamDecoder: num_beams=12 is more than the 11 tokens there are; lower it.",
    ),
    "more paths than tokens": (
        DraftedBeamDecoder(num_paths=12),
        {},
        "DraftedBeamDecoder: num_paths=12 is more than the 11 tokens there are; lower it.",
    ),
    "more blocks than tokens": (
        JointBeamDecoder(num_blocks=12),
        {},
        "JointBeamDecoder: num_blocks=12 is more than the 11 tokens there are; lower it.",
    ),
    "more drafts than horizons": (
        DraftedBeamDecoder(num_drafts=3),
        {},
        "DraftedBeamDecoder: num_drafts=3 is more than the 2 that LinearHeads can draft; lower it.",
    ),
    "a temperature": (
        BeamDecoder(),
        {"sampling": SamplingParams(temperature=0.5)},
        "BeamDecoder: sampling has temperature=0.5, but beams are ranked by the model's own probabilities at "
        "temperature 1; give allowed_tokens alone, or leave sampling out.",
    ),
    "a penalty": (
        DraftedBeamDecoder(),
        {"sampling": SamplingParams(frequency_penalty=0.5, allowed_tokens=[1])},
        "DraftedBeamDecoder: sampling has frequency_penalty=0.5, but beams are ranked by the model's own probabilities",
    ),
    "an allowed token that there is not": (
        BeamDecoder(),
        {"sampling": SamplingParams(allowed_tokens=[11])},
        "SamplingParams: allowed_tokens holds 11, outside the vocabulary 0..10.",
    ),
    "no prompts": (BeamDecoder(), {"prompts": []}, "generate: prompts is empty; give at least one."),
    "no budget": (BeamDecoder(), {"max_new_tokens": 0}, "generate: max_new_tokens must be at least 1, got 0."),
}


@pytest.mark.parametrize(("decoder", "arguments", "sentence"), USED_WRONG.values(), ids=USED_WRONG)
def test_bad_input_is_rejected_before_any_work(decoder: Decoder, arguments: dict[str, Any], sentence: str) -> None:
    model = clock(3)
    model.trunk.register_forward_pre_hook(lambda *_: pytest.fail("the trunk was run"))
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        decoder.stream(model, **({"prompts": [[1]], "max_new_tokens": 3} | arguments))


@pytest.mark.parametrize("decoder", DECODERS[1:])
def test_one_horizon_cannot_draft_for_beams(decoder: Decoder) -> None:
    sentence = "LinearHeads with 1 horizon can draft nothing; use BeamDecoder, or heads with more horizons."
    with pytest.raises(ValueError, match=f"^{type(decoder).__name__}: {re.escape(sentence)}$"):
        decoder.generate(clock(1), [[1]], max_new_tokens=3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_nan_logits_are_rejected(decoder: Decoder) -> None:
    model = make_model("gru", "linear", 3).eval()
    with torch.no_grad():
        model.unembedding.weight[4, 2] = math.nan
    with pytest.raises(ValueError, match=r"^generate: the model's logits are not numbers \(NaN\); check its weights"):
        decoder.generate(model, [[1, 2], [3]], max_new_tokens=4)
