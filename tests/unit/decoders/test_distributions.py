"""The distributions that rounds tell: the very ones of the run, and none unless asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.decoders import (
    Acceptance,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    RoundDistributions,
    SamplingParams,
    StaticTree,
)
from mtp_modules.decoders.sampling.noise import RowNoise
from mtp_modules.decoders.verification.functional import Verdict
from mtp_modules.decoders.verification.rules import Candidates
from tests.helpers import VOCAB, assert_same, lists_of, make_model

PROMPTS = [[1, 2, 3, 4], [5, 6]]


class Spy(Acceptance):
    """Rejection sampling that remembers what it was given."""

    def __init__(self) -> None:
        self.inner, self.seen = RejectionSampling(), []

    def sample_draft(self, *arguments: Any) -> Tensor:
        return self.inner.sample_draft(*arguments)

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        self.seen.append(candidates[:3])
        return self.inner.verify(candidates, noise)


def probs_after(model: MTPModel, text: list[int]) -> Tensor:
    """Read a text afresh, and return the distribution of horizon 1."""
    tokens = torch.tensor([text + [0] * model.lookahead])
    with torch.no_grad():
        return model.unembedding.logits(model(tokens)[0][0, -1]).softmax(dim=-1)


@pytest.mark.parametrize("heads", ["linear", "parallel", "recurrent"])
def test_sampled_runs_tell_what_was_sampled_from_and_verified_by(heads: str) -> None:
    model, spy = make_model("transformer", heads, 4), Spy()
    params = SamplingParams(temperature=0.8, top_k=6)
    stream = SpeculativeDecoder(acceptance=spy, return_distributions=True).stream(
        model, PROMPTS, max_new_tokens=12, sampling=params
    )
    first, *rounds = stream
    assert first.distributions is not None
    assert first.distributions.draft_probs.shape == (2, 0, VOCAB)
    assert len(rounds) == len(spy.seen) > 1
    for done, (drafts, source, target) in zip(rounds, spy.seen, strict=True):
        assert isinstance(done.distributions, RoundDistributions)
        for kept, given in zip(
            (done.distributions.drafts, done.distributions.draft_probs, done.distributions.target_probs),
            (drafts, source, target),
            strict=True,
        ):
            assert torch.equal(kept, given)


@pytest.mark.parametrize("heads", ["linear", "parallel", "recurrent"])
def test_greedy_runs_tell_the_distributions_that_the_choices_are_the_most_likely_of(heads: str) -> None:
    model = make_model("gru", heads, 4)
    text = list(PROMPTS[0])
    for done in SpeculativeDecoder(return_distributions=True).stream(model, [text], max_new_tokens=12):
        assert done.distributions is not None
        (tokens,), (accepted,) = done.tokens, done.accepted
        drafts, all_probs = done.distributions.drafts[0], done.distributions.target_probs[0]
        assert torch.equal(done.distributions.draft_probs[0].argmax(dim=-1), drafts)
        assert all_probs[:accepted].argmax(dim=-1).tolist() == drafts[:accepted].tolist()
        for depth in range(len(all_probs)):
            assert_same(all_probs[depth], probs_after(model, text + drafts[:depth].tolist()))
        text += tokens
        assert all_probs[accepted].argmax().item() == tokens[accepted]


def test_plain_decoding_tells_its_distributions() -> None:
    model, text = make_model("lstm", "linear", 1), [3, 1]
    params = SamplingParams(temperature=0.5)
    for done in AutoregressiveDecoder(return_distributions=True).stream(
        model, [text], max_new_tokens=5, sampling=params, seed=2
    ):
        assert done.distributions is not None
        assert done.distributions.drafts.shape == (1, 0)
        assert_same(
            done.distributions.target_probs[0, 0],
            probs_after(model, text).pow(2) / probs_after(model, text).pow(2).sum(),
        )
        text = text + done.tokens[0]


@pytest.mark.parametrize(
    "drafter", [PromptLookup(num_drafts=3), LookupOrHeads(longest=2, shortest=1)], ids=["text", "both"]
)
def test_what_was_looked_up_has_a_point_mass(drafter: Any) -> None:
    model = make_model("transformer", "linear", 4)
    rounds = list(
        SpeculativeDecoder(drafter=drafter, return_distributions=True).stream(
            model, [[1, 2, 3, 1, 2, 3, 1]], max_new_tokens=9
        )
    )
    chances = [
        done.distributions.draft_probs.gather(2, done.distributions.drafts[:, :, None])
        for done in rounds
        if done.distributions is not None
    ]
    assert len(chances) == len(rounds)
    assert any(bool((chance == 1).all()) for chance in chances[1:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_kept_unless_asked_for_and_keeping_changes_nothing(temperature: float) -> None:
    model, params = make_model("transformer", "recurrent", 4), SamplingParams(temperature=temperature)
    runs = [
        list(
            SpeculativeDecoder(return_distributions=keep).stream(
                model, PROMPTS, max_new_tokens=15, sampling=params, seed=5
            )
        )
        for keep in (False, True)
    ]
    assert all(done.distributions is None for done in runs[0])
    assert lists_of(runs[0]) == lists_of(runs[1])
    assert [len(done.distributions.drafts) for done in runs[1] if done.distributions] == [
        len(done.rows) for done in runs[1]
    ]


def test_a_tree_keeps_no_distributions() -> None:
    with pytest.raises(ValueError, match="return_distributions needs a chain of drafts, not a tree"):
        SpeculativeDecoder(tree=StaticTree(widths=[2, 1]), return_distributions=True)
