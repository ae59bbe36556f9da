"""Drafts out of few tokens: what they are drawn from, and that the output knows nothing of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, LinearHeads, MTPModel, RecurrentTrunk, SpeculativeDecoder
from mtp_modules.core import describe
from mtp_modules.decoders import (
    Acceptance,
    BlockVerification,
    ExactMatch,
    RejectionSampling,
    SamplingParams,
    StaticTree,
)
from tests.helpers import SCORED, VOCAB, assert_same, make_model
from tests.properties.test_sampling import SETTINGS, check_continuations

PROMPTS = [[1, 2, 3], [4], [5, 6]]
FEW = [2, 3, 5, 9]
RULES: dict[str, Callable[[], Acceptance]] = {
    "exact": ExactMatch,
    "rejection": RejectionSampling,
    "block": BlockVerification,
}


@pytest.mark.parametrize("heads", SCORED)
@pytest.mark.parametrize("own", [False, True])
def test_greedy_output_is_that_of_plain_decoding(heads: str, own: bool) -> None:
    model = make_model("transformer", heads, 4, own=own, bias=True, draft_tokens=FEW).eval()
    plain = AutoregressiveDecoder().generate(model, PROMPTS, max_new_tokens=12)
    for decoder in (SpeculativeDecoder(), SpeculativeDecoder(tree=StaticTree(widths=[3, 2]))):
        assert decoder.generate(model, PROMPTS, max_new_tokens=12).tokens == plain.tokens


@settings(max_examples=settings.default.max_examples // 3)
@given(
    seed=st.integers(0, 99),
    few=st.sets(st.integers(0, VOCAB - 1), min_size=1).map(sorted),
    allowed=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1).map(sorted),
    top_k=st.none() | st.integers(1, VOCAB),
    penalty=st.sampled_from([0.0, 0.7]),
)
def test_sampled_output_is_the_very_sample_of_plain_decoding(
    seed: int, few: list[int], allowed: list[int] | None, top_k: int | None, penalty: float
) -> None:
    """Also where no draft token is allowed at all."""
    model = make_model("gru", "recurrent", 4, seed=seed, draft_tokens=few).eval()
    params = SamplingParams(temperature=0.8, top_k=top_k, frequency_penalty=penalty, allowed_tokens=allowed)
    options = {"max_new_tokens": 9, "sampling": params, "seed": seed}
    plain = AutoregressiveDecoder().generate(model, PROMPTS, **options)
    assert SpeculativeDecoder().generate(model, PROMPTS, **options).tokens == plain.tokens


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("allowed", [None, [0, 1]], ids=["all", "no_draft_token"])
def test_drafts_have_their_distribution_over_all_tokens_and_zeros_elsewhere(
    name: str, allowed: list[int] | None
) -> None:
    """``min(p, q) + (1 - sum min) * residual = p``, with the very tensors of each round."""
    model = make_model("transformer", "linear", 4, draft_tokens=FEW).eval()
    params = SamplingParams(temperature=0.9, allowed_tokens=allowed)
    decoder = SpeculativeDecoder(acceptance=RULES[name](), return_distributions=True)
    seen = 0
    for done in decoder.stream(model, PROMPTS, max_new_tokens=8, sampling=params):
        assert done.distributions is not None
        q, p = (
            done.distributions.draft_probs,
            done.distributions.target_probs[:, : done.distributions.draft_probs.shape[1]],
        )
        seen += q.shape[1]
        if allowed is None:
            outside = [token for token in range(VOCAB) if token not in FEW]
            assert not q[..., outside].any()
        if not q.numel():
            continue
        assert_same(q.sum(dim=2), torch.ones_like(q[..., 0]), tolerance=1e-12)
        both = torch.minimum(p, q)
        residual = (p - q).clamp(min=0)
        residual = residual / residual.sum(dim=2, keepdim=True).clamp(min=1e-300)
        assert_same(both + (1 - both.sum(dim=2, keepdim=True)) * residual, p, tolerance=1e-12)
    assert seen


@pytest.mark.parametrize("name", RULES)
def test_continuations_follow_the_distribution_of_the_whole_vocabulary(name: str) -> None:
    """Of every continuation, by enumeration, its frequency is its probability."""
    decoder = SpeculativeDecoder(acceptance=RULES[name]())
    check_continuations(decoder, "recurrent", SETTINGS["plain"], 3, 3000, draft_tokens=[0, 2])


def test_trimmed_logits_are_rows_of_the_whole(tmp_path: Path) -> None:
    model = make_model("transformer", "linear", 3, bias=True).eval()
    states = torch.randn(2, model.trunk.d_model, dtype=torch.float64)
    whole = model.unembedding.logits(states, 1)
    model.trim_drafts(FEW)
    trimmed = model.unembedding.logits(states, 1)
    assert_same(trimmed[:, FEW], whole[:, FEW], tolerance=1e-14)
    assert trimmed.isneginf().sum(dim=1).tolist() == [VOCAB - len(FEW)] * 2
    assert torch.equal(model.unembedding.logits(states, 0), whole)
    model.save_pretrained(tmp_path)
    again, _ = MTPModel.from_pretrained(tmp_path)
    assert describe(again) == describe(model)
    assert torch.equal(again.unembedding.logits(states, 2), model.unembedding.logits(states, 2))


def test_own_matrices_keep_their_own_rows() -> None:
    model = make_model("transformer", "linear", 3, own=True)
    wanted = [weight[FEW].clone() for weight in model.unembedding.own_weights]
    model.trim_drafts(FEW)
    assert_same(list(model.unembedding.own_weights), wanted, tolerance=0)
    model.trim_drafts([1])  # once trimmed, rows of horizon 1
    assert_same(list(model.unembedding.own_weights), [model.unembedding.weight[[1]]] * 2, tolerance=0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda model: model.trim_drafts([]),
            r"MTPModel: num_draft_tokens must lie in 1\.\.11, the vocabulary, got 0\.",
        ),
        (lambda model: model.trim_drafts([3, 11]), r"Unembedding: draft tokens must lie in 0\.\.10, got 11\."),
        (
            lambda model: model.trim_drafts([3, 3]),
            "Unembedding: draft tokens must be distinct and at least one",
        ),
        (
            lambda model: MTPModel(
                trunk=RecurrentTrunk(vocab_size=9, d_model=8),
                heads=LinearHeads(d_model=8, num_horizons=1),
                num_draft_tokens=3,
            ),
            "MTPModel: num_draft_tokens is 3, but LinearHeads with one horizon drafts nothing; leave it out",
        ),
    ],
)
def test_what_is_refused(make: Callable, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        make(make_model())
