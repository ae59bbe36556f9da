"""The tensor that drafts are drawn from is the tensor in the ratio, and how many of them count rests on it alone."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.core import Component
from mtp_modules.decoders import (
    Acceptance,
    BlockVerification,
    ConfidentDepth,
    Drafter,
    DraftPolicy,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
)
from mtp_modules.decoders.drafting.drafter import RoundDraftSampler
from mtp_modules.decoders.drafting.policies import DepthChooser
from mtp_modules.decoders.sampling.batch import BatchSampling
from mtp_modules.decoders.sampling.noise import RowNoise
from mtp_modules.decoders.verification.functional import Verdict
from mtp_modules.decoders.verification.round_sampler import RoundSampler
from mtp_modules.decoders.verification.rules import Candidates
from tests.helpers import VOCAB, make_model
from tests.properties.test_sampling import PARAMS, SETTINGS, check_continuations, tiny
from tests.reference import sampling as naive

DRAWING: dict[str, Callable[[], Acceptance]] = {"rejection": RejectionSampling, "block": BlockVerification}


class Watched(Acceptance):
    """Passes everything on, and remembers what was drawn from what, and what was verified."""

    def __init__(self, *, inner: Acceptance) -> None:
        self.inner = inner
        self.drawn: list[tuple[Tensor, Tensor]] = []
        self.rounds: list[tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]] = []
        self.targets: list[Tensor] = []

    def sample_draft(self, probs: Tensor, depth: int, noise: RowNoise) -> Tensor:
        assert depth == len(self.drawn)
        token = self.inner.sample_draft(probs, depth, noise)
        self.drawn.append((probs, token))
        return token

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        self.rounds.append((self.drawn, candidates.drafts, candidates.draft_probs, candidates.limits))
        self.targets.append(candidates.target_probs)
        self.drawn = []
        return self.inner.verify(candidates, noise)


def one_hot(tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens, VOCAB).double()


@pytest.mark.parametrize("drafter", [None, PromptLookup, LookupOrHeads], ids=["heads", "lookup", "both"])
@settings(max_examples=settings.default.max_examples // 4)
@given(data=st.data())
def test_the_source_is_what_each_draft_was_sampled_from(drafter: Callable | None, data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from(["linear", "recurrent", "joint"]), label="heads")
    inner = DRAWING[data.draw(st.sampled_from(list(DRAWING)), label="acceptance")]
    model = make_model("transformer", heads, 4, seed=data.draw(st.integers(0, 9), label="seed")).eval()
    made: dict[str, Drafter] = {} if drafter is None else {"drafter": drafter(num_drafts=3, longest=2, shortest=1)}
    penalised = data.draw(st.booleans(), label="penalties")
    params = SamplingParams(temperature=0.7, top_p=0.95, frequency_penalty=0.4 * penalised)
    watched = Watched(inner=inner())
    decoder = SpeculativeDecoder(acceptance=watched, **made)
    decoder.generate(model, [[1, 2, 1, 2, 3], [4], [5, 6]], max_new_tokens=12, sampling=params)
    looked_up = 0
    for drawn, drafts, source, limits in watched.rounds:
        if drafts.shape[1] == 0:
            continue
        point = (source == one_hot(drafts)).all(dim=2)  # a looked-up draft has the distribution that it is certain
        if drafter is None:
            assert torch.equal(torch.stack([probs for probs, _ in drawn], dim=1), source)
            assert torch.equal(torch.stack([token for _, token in drawn], dim=1), drafts)
            continue
        for place in range(drafts.shape[1]):
            if place < len(drawn):
                probs_of_heads, token = drawn[place]
                from_heads = (source[:, place] == probs_of_heads).all(dim=1) & (drafts[:, place] == token)
            else:
                from_heads = torch.zeros_like(point[:, 0])
            counts = limits > place
            assert (from_heads | point[:, place])[counts].all()
            looked_up += int((point[:, place] & counts).sum())
    assert drafter is None or looked_up


@settings(max_examples=settings.default.max_examples // 3)
@given(params=PARAMS, seed=st.integers(0, 9), heads=st.sampled_from(["linear", "recurrent"]))
def test_the_target_is_the_model_s_distribution_with_its_settings_and_history(
    params: dict, seed: int, heads: str
) -> None:
    """Position by position, the drafts before it counted as text; whatever is drafted."""
    model, prompt = make_model("gru", heads, 4, seed=seed).eval(), [1, 2, 2]
    said, watched = SamplingParams(**params), Watched(inner=RejectionSampling())
    if said.greedy:
        return  # nothing is sampled, and no distribution is made
    text, place = list(prompt), 0
    for done in SpeculativeDecoder(acceptance=watched).stream(model, [prompt], max_new_tokens=8, sampling=said):
        if done.drafted[0]:
            _, drafts, _, _ = watched.rounds[place]
            read = [*text, *drafts[0].tolist()]
            logits = model.unembedding.logits(model(torch.tensor([[*read, *[0] * model.lookahead]]))[0][0])
            for depth, target in enumerate(watched.targets[place][0]):
                end = len(text) + depth
                wanted = naive.probs(logits[end - 1].tolist(), said, prompt, read[len(prompt) : end])
                assert target.tolist() == pytest.approx(wanted, abs=1e-10)
        place += len(text) > len(prompt)  # the prompt's own pass verifies nothing
        text += done.tokens[0]


@pytest.mark.parametrize("name", DRAWING)
def test_drafts_follow_the_distribution_that_they_are_said_to_be_sampled_from(name: str) -> None:
    n, acceptance = 20_000, DRAWING[name]()
    generator = torch.Generator().manual_seed(1)
    probs = torch.randn(VOCAB, generator=generator, dtype=torch.float64).softmax(0)
    noise = RowNoise(torch.arange(n), torch.full((n,), 7), VOCAB, 3)
    seen = [acceptance.sample_draft(probs.expand(n, VOCAB), depth, noise) for depth in range(3)]
    for tokens in seen:
        statistic, degrees = naive.chi_square(torch.bincount(tokens, minlength=VOCAB).tolist(), probs.tolist())
        assert statistic < naive.limit(degrees)
    for one, other in pairwise(seen):  # neighbours are independent: the table of pairs is the product
        pairs = torch.bincount(one * VOCAB + other, minlength=VOCAB**2).tolist()
        statistic, degrees = naive.chi_square(pairs, (probs[:, None] * probs).flatten().tolist())
        assert statistic < naive.limit(degrees)


class Sharpened(Acceptance):
    """The bug: drafts are drawn from another distribution than the one that is divided by."""

    def __init__(self, *, inner: Acceptance) -> None:
        self.inner = inner

    def sample_draft(self, probs: Tensor, depth: int, noise: RowNoise) -> Tensor:
        return self.inner.sample_draft(probs.square() / probs.square().sum(dim=1, keepdim=True), depth, noise)

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        return self.inner.verify(candidates, noise)


def test_sampling_from_another_distribution_than_the_ratio_s_biases_the_output() -> None:
    """The test of distributions can fail, and this is what it is there for."""
    decoder = SpeculativeDecoder(acceptance=Sharpened(inner=RejectionSampling()))
    with pytest.raises(AssertionError, match="assert"):
        check_continuations(decoder, "recurrent", SETTINGS["plain"], 3, 2000)


DEPTHS: dict[str, Callable[[], dict[str, Component]]] = {
    "confident": lambda: {"policy": ConfidentDepth(threshold=0.3)},
    "both": lambda: {"drafter": LookupOrHeads(longest=2, shortest=1)},
    "predicted": lambda: {"policy": ConfidentDepth(threshold=0.25, predicted=True)},
}


@pytest.mark.parametrize(
    ("acceptance", "options"),
    [("rejection", "both"), ("block", "confident"), ("rejection", "predicted"), ("block", "predicted")],
)
def test_lookup_and_confidence_keep_the_distribution(acceptance: str, options: str) -> None:
    decoder = SpeculativeDecoder(acceptance=DRAWING[acceptance](), **DEPTHS[options]())
    heads = "confident" if options == "predicted" else "recurrent"
    check_continuations(decoder, heads, SETTINGS["plain"], 3, 2000)


@settings(max_examples=2 * settings.default.max_examples)
@given(
    seed=st.integers(0, 999),
    limits=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
    threshold=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    drawn=st.booleans(),
)
def test_predicted_acceptance_leaves_out_the_draft_that_falls_below_it_whatever_it_is(
    seed: int, limits: list[int], threshold: float, drawn: bool
) -> None:
    rows, depth, cpu = len(limits), max(limits), torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, depth, VOCAB, generator=generator, dtype=torch.float64)
    chances = torch.rand(rows, depth, generator=generator, dtype=torch.float64)
    noise = RowNoise(torch.arange(rows), torch.full((rows,), seed), VOCAB, depth)
    params = BatchSampling([SamplingParams(temperature=0.5)] * rows, VOCAB, cpu) if drawn else None
    chooser = ConfidentDepth(threshold=threshold, predicted=True).start(depth)
    sampler = None if params is None else RoundSampler(params, RejectionSampling(), noise, None)
    choice = RoundDraftSampler(torch.tensor(limits), sampler, chooser)
    for place in range(depth):
        choice(logits[:, place], chances[:, place])
        if choice.done:
            break
    counts = [
        next((d for d in range(limit) if chances[b, : d + 1].prod() < threshold), limit)
        for b, limit in enumerate(limits)
    ]
    assert choice.limits.tolist() == counts
    assert place == min(max(counts), depth - 1)  # drafting ends with the first draft that no row counts


@settings(max_examples=4 * settings.default.max_examples)
@given(
    seed=st.integers(0, 999),
    limits=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
    threshold=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    drawn=st.booleans(),
)
def test_confidence_counts_the_draft_that_fell_below_it_and_none_after(
    seed: int, limits: list[int], threshold: float, drawn: bool
) -> None:
    rows, depth, cpu = len(limits), max(limits), torch.device("cpu")
    logits = 3 * torch.randn(rows, depth, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = RowNoise(torch.arange(rows), torch.full((rows,), seed), VOCAB, depth)
    params = BatchSampling([SamplingParams(temperature=0.5)] * rows, VOCAB, cpu) if drawn else None
    chooser = ConfidentDepth(threshold=threshold).start(depth)
    sampler = None if params is None else RoundSampler(params, RejectionSampling(), noise, None)
    choice, tokens = RoundDraftSampler(torch.tensor(limits), sampler, chooser), []
    for of_depth in logits.unbind(dim=1):
        tokens.append(choice(of_depth)[0].tolist())
        if choice.done:
            break
    probs = (logits / 0.5 if drawn else logits).softmax(dim=2)
    counts = []
    for b, limit in enumerate(limits):
        chance, count = 1.0, 0
        while count < limit and chance >= threshold:
            chance *= float(probs[b, count, tokens[count][b]])
            count += 1
        counts.append(count)
    assert choice.limits.clamp(max=len(tokens)).tolist() == counts
    assert len(tokens) == max(counts)  # drafting ends when no row goes on


def test_a_policy_never_sees_the_model_s_own_distribution() -> None:
    """Confidence is all that it is told before a round, and counts and time are all that it is told after."""
    told: list[tuple[str, ...]] = []

    class Spy(DepthChooser):
        watches = True

        def goes_on(self, confidence: Tensor) -> Tensor:
            told.append(("confidence",))
            assert ((confidence >= 0) & (confidence <= 1)).all()
            return confidence >= 0.3

        def learn(self, *arguments: Any) -> None:
            assert all(isinstance(value, int | float) or value.dtype == np.int64 for value in arguments)

    class Policy(DraftPolicy):
        def start(self, most: int) -> DepthChooser:
            return Spy(most)

    model, params = tiny("recurrent"), SamplingParams()
    plain = AutoregressiveDecoder().generate(model, [[1, 4]], max_new_tokens=20, sampling=params)
    decoder = SpeculativeDecoder(policy=Policy())
    assert decoder.generate(model, [[1, 4]], max_new_tokens=20, sampling=params).tokens == plain.tokens
    assert told
