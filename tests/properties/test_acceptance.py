"""Acceptance rules against naive ones, and the distribution of what comes out of those by enumeration."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules.decoders.verification.functional import (
    accept_among_top,
    accept_block,
    accept_by_rejection,
    accept_typical,
)
from tests.reference import acceptance as naive

VOCAB = 4
RULES = {"rejection": (accept_by_rejection, naive.rejection), "block": (accept_block, naive.block)}
LAST_UNIFORM = 1 - 2.0**-53  # the largest number that is drawn


def random_probs(numbers: random.Random, size: int = VOCAB, *, zeros: bool = False) -> list[float]:
    weights = [numbers.random() ** 2 * (not zeros or numbers.random() < 0.6) for _ in range(size)]
    weights[numbers.randrange(size)] += 0.01
    return [weight / sum(weights) for weight in weights]


class Batch:
    """Rows with distributions, with drafts that the sources could have drawn, and with numbers to decide with."""

    def __init__(self, seed: int, rows: int, num_drafts: int, *, zeros: bool, equal: bool) -> None:
        numbers = random.Random(seed)

        def all_probs(count: int) -> list[list[list[float]]]:
            return [[random_probs(numbers, zeros=zeros) for _ in range(count)] for _ in range(rows)]

        self.source, self.target = all_probs(num_drafts), all_probs(num_drafts + 1)
        if equal:
            self.target = [[*source, target[-1]] for source, target in zip(self.source, self.target, strict=True)]
        self.drafts = [[numbers.choices(range(VOCAB), probs)[0] for probs in row] for row in self.source]
        self.limits = [numbers.randint(0, num_drafts) for _ in range(rows)]
        self.uniform = [[numbers.random() for _ in range(num_drafts + 1)] for _ in range(rows)]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        rows = len(self.limits)
        real = {"dtype": torch.float64}
        source, target = torch.tensor(self.source, **real), torch.tensor(self.target, **real)
        drafts = torch.tensor(self.drafts, dtype=torch.long).view(rows, -1)
        source = source.view(rows, -1, VOCAB)
        return drafts, source, target, torch.tensor(self.limits), torch.tensor(self.uniform, **real)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=4 * settings.default.max_examples)
@given(
    seed=st.integers(0, 9999),
    num_drafts=st.integers(0, 4),
    zeros=st.booleans(),
    eq=st.booleans(),
)
def test_a_rule_says_what_its_naive_twin_says(name: str, seed: int, num_drafts: int, zeros: bool, eq: bool) -> None:
    fast, slow = RULES[name]
    batch = Batch(seed, 40, num_drafts, zeros=zeros, equal=eq)
    verdict = fast(*batch.tensors())
    for b, limit in enumerate(batch.limits):
        round_ = slow(batch.drafts[b][:limit], batch.source[b][:limit], batch.target[b][: limit + 1])
        first, *others = batch.uniform[b]
        accepted = round_.accepted(others[:limit])
        assert verdict.accepted[b] == accepted
        assert verdict.following[b] == naive.draw(round_.follows[accepted], first)


@settings(max_examples=4 * settings.default.max_examples)
@given(
    seed=st.integers(0, 9999),
    num_drafts=st.integers(0, 4),
    zeros=st.booleans(),
    epsilon=st.sampled_from([0.01, 0.09, 0.4, 1.0]),
    delta=st.sampled_from([0.1, 0.3, 1.0]),
)
def test_typical_acceptance_says_what_its_naive_twin_says(
    seed: int, num_drafts: int, zeros: bool, epsilon: float, delta: float
) -> None:
    batch = Batch(seed, 3, num_drafts, zeros=zeros, equal=False)
    drafts, _, target, limits, uniform = batch.tensors()
    verdict = accept_typical(drafts, target, limits, uniform[:, 0], epsilon=epsilon, delta=delta)
    for b, limit in enumerate(batch.limits):
        accepted = naive.typical(batch.drafts[b][:limit], batch.target[b], epsilon, delta)
        assert verdict.accepted[b] == accepted
        assert verdict.following[b] == naive.draw(batch.target[b][accepted], batch.uniform[b][0])


@settings(max_examples=4 * settings.default.max_examples)
@given(seed=st.integers(0, 9999), num_drafts=st.integers(0, 4), top_k=st.integers(1, 5), ties=st.booleans())
def test_top_k_acceptance_says_what_its_naive_twin_says(seed: int, num_drafts: int, top_k: int, ties: bool) -> None:
    batch = Batch(seed, 3, num_drafts, zeros=True, equal=False)
    drafts, _, target, limits, uniform = batch.tensors()
    scores = (4 * target).round() if ties else target
    scores = scores.masked_fill(target == 0, -torch.inf)
    verdict = accept_among_top(drafts, scores, target, limits, uniform[:, 0], top_k=top_k)
    for b, limit in enumerate(batch.limits):
        accepted = naive.among_top(batch.drafts[b][:limit], scores[b].tolist(), top_k)
        assert verdict.accepted[b] == accepted
        assert verdict.following[b] == naive.draw(batch.target[b][accepted], batch.uniform[b][0])


@pytest.mark.parametrize("rule", [accept_by_rejection, accept_block])
def test_a_token_of_probability_zero_is_not_accepted_even_by_the_smallest_number(rule: Callable) -> None:
    target = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
    source = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64)
    uniform = torch.zeros(1, 2, dtype=torch.float64)
    verdict = rule(torch.tensor([[0]]), source, target, torch.tensor([1]), uniform)
    assert (verdict.accepted.tolist(), verdict.following.tolist()) == ([0], [1])


@pytest.mark.parametrize("rule", [accept_by_rejection, accept_block])
def test_distributions_that_are_equal_up_to_rounding_leave_no_empty_residual(rule: Callable) -> None:
    """Where nothing is left of ``p - q``, what follows comes from ``p``, and not from nowhere."""
    target = torch.tensor([[[0.5, 0.5, 0.0]] * 2], dtype=torch.float64)
    source = target[:, :1] * (1 + 2.0**-51)
    uniform = torch.full((1, 2), LAST_UNIFORM, dtype=torch.float64)
    verdict = rule(torch.tensor([[0]]), source, target, torch.tensor([1]), uniform)
    assert (verdict.accepted.tolist(), verdict.following.tolist()) == ([0], [1])


class Laws(dict):
    """A distribution after each sequence, drawn when it is first asked for."""

    def __init__(self, seed: int, size: int, *, zeros: bool) -> None:
        super().__init__()
        self.numbers, self.size, self.zeros = random.Random(seed), size, zeros

    def __missing__(self, text: tuple[int, ...]) -> list[float]:
        self[text] = random_probs(self.numbers, self.size, zeros=self.zeros)
        return self[text]


def until_unlikely(source: Laws, threshold: float, *, with_it: bool = True) -> Callable[[tuple[int, ...]], int]:
    """Count drafts up to the one that makes them unlikely together: with it, or, as is wrong, without it."""

    def counted(drafts: tuple[int, ...]) -> int:
        chance = 1.0
        for place, token in enumerate(drafts):
            chance *= source[drafts[:place]][token]
            if chance < threshold:
                return place + with_it
        return len(drafts)

    return counted


def error(rule: Callable, seed: int, counted: Callable[[Laws], Callable], *, zeros: bool = False) -> float:
    source, target = Laws(seed, 3, zeros=zeros), Laws(seed + 1000, 3, zeros=zeros)
    found = naive.output_probs(rule, source, target, 3, counted(source))
    assert sum(found.values()) == pytest.approx(1)
    return max(
        abs(chance - math.prod(target[text[:place]][token] for place, token in enumerate(text)))
        for text, chance in found.items()
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("zeros", [False, True])
def test_every_sequence_has_the_probability_that_plain_decoding_gives_it(name: str, zeros: bool) -> None:
    """All 81 continuations of four tokens over three, with any number of drafts, and distributions that change."""
    for seed, number in itertools.product(range(5), range(4)):
        assert error(RULES[name][1], seed, lambda _, number=number: lambda drafts: number, zeros=zeros) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_a_depth_that_follows_confidence_keeps_the_distribution(name: str) -> None:
    for seed, threshold in itertools.product(range(5), (0.1, 0.3, 0.6)):
        assert error(RULES[name][1], seed, lambda source, at=threshold: until_unlikely(source, at)) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_leaving_out_a_draft_because_of_what_it_is_would_bias_the_distribution(name: str) -> None:
    """The proof above can fail."""
    for seed in range(5):
        assert error(RULES[name][1], seed, lambda source: until_unlikely(source, 0.3, with_it=False)) > 1e-3


def test_the_wrong_residual_would_bias_the_distribution() -> None:
    def without_residual(*arguments: list) -> naive.Round:
        return naive.rejection(*arguments)._replace(follows=[list(probs) for probs in arguments[2]])

    assert error(without_residual, 0, lambda _: lambda drafts: 3) > 1e-3


def test_block_verification_accepts_at_least_as_many_as_rejection() -> None:
    for seed in range(20):
        source, target = Laws(seed, 3, zeros=False), Laws(seed + 1000, 3, zeros=False)
        means = []
        for _, rule in RULES.values():
            mean = 0.0
            for drafts in itertools.product(range(3), repeat=3):
                befores = [drafts[:place] for place in range(4)]
                chance = math.prod(source[before][token] for before, token in zip(befores, drafts, strict=False))
                all_probs = [source[before] for before in befores[:3]], [target[before] for before in befores]
                mean += chance * sum(n * share for n, share in enumerate(rule(drafts, *all_probs).probs_of_accepted()))
            means.append(mean)
        assert means[1] >= means[0] - 1e-12
