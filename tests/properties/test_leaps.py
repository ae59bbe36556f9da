"""Horizons that leap: trained on their own targets, drafted without gaps, and lossless like all others."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, ExplicitWeights, MultiTokenLoss, SpeculativeDecoder
from mtp_modules.core.targets import horizon_of_draft
from mtp_modules.decoders import (
    BeamDecoder,
    DraftedBeamDecoder,
    DynamicTree,
    ExactMatch,
    RejectionSampling,
    SamplingParams,
    StaticTree,
)
from mtp_modules.metrics.functional import accepted_lengths
from tests.helpers import LEAPS, TRUNKS_WITH_LEAPS, assert_same, gradients, make_model, random_tokens
from tests.reference import loss as naive

STRIDES = {"linear_leap": 2, "residual_leap": 4, "parallel_leap": 3, "transition_leap": 2}
PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [3, 3]]
"""Some shorter than a leap, so that there is no position yet that speaks of the tokens between."""


@pytest.mark.parametrize("heads", LEAPS)
def test_horizons_leap_and_drafts_reach_the_farthest(heads: str) -> None:
    model = make_model("gru", heads, 3)
    farthest = 1 + 2 * STRIDES[heads]
    assert model.horizons == (1, 1 + STRIDES[heads], farthest)
    assert (model.lookahead, model.heads.max_drafts) == (farthest, farthest - 1)
    assert SpeculativeDecoder().drafter.limits(model.heads) == (farthest - 1, farthest - 1)


@pytest.mark.parametrize("heads", LEAPS)
@pytest.mark.parametrize("distillation", [0.0, 0.3])
def test_the_loss_of_leaps_equals_the_naive_triple_loop(heads: str, distillation: float) -> None:
    model = make_model("transformer_grouped", heads, 3)
    tokens = random_tokens(2, model.lookahead + 5)
    weights = [1.0, 0.4, 2.5]
    terms = MultiTokenLoss(weights=ExplicitWeights(values=weights), distillation=distillation)(model, tokens)
    expected = naive.multi_token_loss(model, tokens, weights, distillation=distillation)
    assert_same(terms.loss, expected)
    assert_same(gradients(model, terms.loss), gradients(model, expected))


@pytest.mark.parametrize("heads", LEAPS)
def test_accepted_length_counts_tokens_not_heads(heads: str) -> None:
    """Against drafting at every position: how many drafts are horizon 1's own choices along the text."""
    model = make_model("gru", heads, 3, seed=3).eval()
    tokens = random_tokens(3, model.lookahead + 12, seed=2)
    length = tokens.shape[1] - model.lookahead
    terms = MultiTokenLoss()(model, tokens)
    states = model(tokens)
    chosen = [model.unembedding.logits(state, index).argmax(dim=-1) for index, state in enumerate(states)]
    lengths, seen = accepted_lengths(terms.agrees), 0
    for b, t in itertools.product(range(3), range(length)):
        sources = [horizon_of_draft(model.horizons, depth) for depth in range(model.lookahead - 1)]
        known = t + model.lookahead - 1 < length and all(back <= t for _, back in sources)
        assert terms.comparable[b, t] == known
        if known:
            hits = [chosen[index][b, t - back] == chosen[0][b, t + 1 + d] for d, (index, back) in enumerate(sources)]
            assert lengths[b, t] == 1 + len(list(itertools.takewhile(bool, hits)))
            seen += 1
    assert seen > 0


def test_a_sample_of_positions_cannot_tell_the_accepted_length_of_leaps() -> None:
    model, tokens = make_model("gru", "linear_leap", 3), random_tokens(2, 15)
    assert MultiTokenLoss()(model, tokens).comparable.any()
    assert not MultiTokenLoss(share_of_positions=0.9)(model, tokens).comparable.any()


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_LEAPS)
@settings(max_examples=settings.default.max_examples // 12)
@given(seed=st.integers(0, 99), num_horizons=st.integers(2, 4), temperature=st.sampled_from([0.0, 0.9]))
def test_decoding_with_leaps_equals_plain_decoding(
    trunk: str, heads: str, seed: int, num_horizons: int, temperature: float
) -> None:
    model = make_model(trunk, heads, num_horizons, seed=seed).eval()
    asked = {"max_new_tokens": 12, "sampling": SamplingParams(temperature=temperature), "seed": seed}
    wanted = AutoregressiveDecoder().generate(model, PROMPTS, **asked).tokens
    ways = [SpeculativeDecoder(acceptance=ExactMatch()), SpeculativeDecoder(num_drafts=2)]
    if model.trunk.supports_trees:
        ways.append(SpeculativeDecoder(tree=StaticTree(widths=[2, 2, 1, 1])) if num_horizons > 2 else ways[0])
        ways.append(SpeculativeDecoder(tree=DynamicTree(depth=2, width=2, nodes=4)))
    if temperature == 0.0:
        ways.append(SpeculativeDecoder(acceptance=RejectionSampling()))
    for decoder in ways:
        assert decoder.generate(model, PROMPTS, **asked).tokens == wanted


@pytest.mark.parametrize("heads", LEAPS)
def test_beams_drafted_by_leaps_are_the_same_beams(heads: str) -> None:
    model = make_model("transformer", heads, 3).eval()
    wanted = BeamDecoder(num_beams=2).generate(model, PROMPTS, max_new_tokens=7)
    found = DraftedBeamDecoder(num_beams=2).generate(model, PROMPTS, max_new_tokens=7)
    assert found.tokens == wanted.tokens
    assert found.stats.forwards <= wanted.stats.forwards
