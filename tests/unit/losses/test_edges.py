"""The loss at its edges: negative labels, logits of minus infinity, float16 beyond its range, bad numbers."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

from mtp_modules import MultiTokenLoss
from mtp_modules.core.objective import HorizonWeights, OutputMatrix, Teacher
from mtp_modules.core.targets import count_targets
from mtp_modules.data import CountsAhead
from mtp_modules.losses import (
    FusedLinearCrossEntropy,
    NaiveLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
    TorchLinearCrossEntropy,
)
from mtp_modules.metrics.functional import counts
from tests.helpers import SCORED, assert_same, gradients, make_model, random_tokens
from tests.reference import linear_cross_entropy as reference

BACKENDS = [
    NaiveLinearCrossEntropy(),
    FusedLinearCrossEntropy(rows_per_chunk=2),
    RecomputeLinearCrossEntropy(rows_per_chunk=2),
    SequentialLinearCrossEntropy(),
]


def test_negative_labels_are_masked_targets() -> None:
    inputs, labels = random_tokens(3, 9), random_tokens(3, 9, seed=1)
    labels[0, 2:5], labels[1, :], labels[2, 8] = -100, -1, -100
    mask = labels >= 0
    for heads in SCORED:
        model = make_model("gru", heads, 3)
        loss = MultiTokenLoss(distillation=0.3)
        found = loss(model, labels, inputs=inputs)
        masked = loss(model, labels.clamp(min=0), inputs=inputs, loss_mask=mask)
        assert_same(found.loss, masked.loss, tolerance=0)
        assert_same(counts(found, (1, 5)), counts(masked, (1, 5)), tolerance=0)
        assert_same(gradients(model, found.loss), gradients(model, masked.loss), tolerance=0)
        assert found.count.equal(count_targets(labels, model.horizons))
        (ahead,) = CountsAhead([{"tokens": labels}], horizons=model.horizons, batches=1)
        assert found.count.equal(ahead["counts_ahead"][0])


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_logit_of_minus_infinity_makes_no_nan() -> None:
    """A token that has probability 0 with teacher and student might as well not be in the vocabulary."""
    bias = _random(7, seed=1)
    bias[6] = -torch.inf
    options: Any = itertools.product(BACKENDS, [0.0, 0.4, 1.0], [1.0, 2.0], [False, True])
    for backend, variation, temperature, far_teacher in options:
        states, weight = _random(5, 4, seed=2).requires_grad_(), _random(7, 4, seed=3).requires_grad_()
        share = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        matrix = OutputMatrix(_random(7, 4, seed=4), bias) if far_teacher else None
        teacher = Teacher(_random(3, 4, seed=5), share, matrix, temperature, variation)
        targets, weights = torch.tensor([0, 3, -1, 2, 5]), torch.tensor([1.0, 0.5, 1.0, 2.0, 0.7], dtype=torch.float64)
        terms = backend(states, [OutputMatrix(weight, bias)], [5], targets, weights, teacher)
        fewer = None if matrix is None else OutputMatrix(matrix.weight[:6], bias[:6])
        few = Teacher(teacher.states, share, fewer, temperature, variation)
        expected = reference.linear_cross_entropy(
            states, [OutputMatrix(weight[:6], bias[:6])], [5], targets, weights, few
        )
        assert_same(terms.loss, expected[0])
        wanted = torch.autograd.grad(expected[0], (states, weight))
        assert_same(torch.autograd.grad(terms.loss, (states, weight)), wanted)


def test_an_impossible_target_is_infinite_and_never_nan() -> None:
    """The loss is infinite where its weight is above 0, and 0 otherwise; gradients are finite."""
    bias = torch.zeros(7, dtype=torch.float64)
    bias[6] = -torch.inf
    for backend, weight, share, variation in itertools.product(
        [*BACKENDS, TorchLinearCrossEntropy()], [0.0, 1.0], [None, 0.0, 1.0], [0.0, 1.0]
    ):
        if isinstance(backend, TorchLinearCrossEntropy) and (share is not None or variation):
            continue
        states, matrix = _random(2, 4, seed=2).requires_grad_(), _random(7, 4, seed=3).requires_grad_()
        teacher = None
        if share is not None:  # it gives the impossible token a probability
            shares = torch.full((2,), share, dtype=torch.float64)
            teacher = Teacher(_random(2, 4, seed=5), shares, OutputMatrix(_random(7, 4, seed=4)), 1.0, variation)
        weights = torch.tensor([1.0, weight], dtype=torch.float64)
        targets = torch.tensor([0, 6])
        terms = backend(states, [OutputMatrix(matrix, bias)], [2], targets, weights, teacher)
        imitated = share == 1.0
        infinite = variation == 0.0 if imitated else weight > 0
        assert terms.loss.isinf() == infinite, (backend, weight, share, variation)
        assert not terms.loss.isnan()
        for gradient in torch.autograd.grad(terms.loss, (states, matrix)):
            assert gradient.isfinite().all()


def test_a_joint_distribution_with_an_impossible_token_is_infinite_and_never_nan() -> None:
    model = make_model(heads="joint", bias=True)
    tokens = torch.tensor([[1, 2, 6, 4, 5, 0]])
    allowed, loss = tokens.where(tokens != 6, 3), MultiTokenLoss()
    before = loss(model, allowed).loss
    with torch.no_grad():
        model.unembedding.bias[6] = -torch.inf
    mask = torch.tensor([[True, True, False, True, True, True]])
    for terms, infinite in ((loss(model, allowed), False), (loss(model, tokens, loss_mask=mask), False)):
        assert terms.loss.isinf() == infinite
        for gradient in gradients(model, terms.loss).values():
            assert gradient.isfinite().all()
    assert loss(model, allowed).loss < before
    impossible = loss(model, tokens)
    assert impossible.loss == torch.inf
    assert not any(gradient.isnan().any() for gradient in gradients(model, impossible.loss).values())


def test_float16_logits_beyond_its_range_are_finite() -> None:
    for backend in [*BACKENDS, TorchLinearCrossEntropy()]:
        states = (600 * _random(5, 4, seed=2)).half().requires_grad_()
        weight = (150 * _random(7, 4, seed=3)).half().requires_grad_()
        targets, weights = torch.tensor([0, 3, -1, 2, 5]), torch.tensor([1.0, 0.5, 1.0, 2.0, 0.7]).div(1000)
        logits = states.detach().double() @ weight.detach().double().T
        assert logits.abs().max() > 65504
        wide = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
        expected = NaiveLinearCrossEntropy()(wide[0], [OutputMatrix(wide[1])], [5], targets, weights.double())
        terms = backend(states, [OutputMatrix(weight)], [5], targets, weights)
        torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(terms.nll.double(), expected.nll, rtol=1e-5, atol=0)
        assert torch.equal(terms.rank[targets >= 0], expected.rank[targets >= 0])
        found = torch.autograd.grad(terms.loss, (states, weight))
        for got, want in zip(found, torch.autograd.grad(expected.loss, wide), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-4 * float(want.abs().max()))
    model = make_model("gru", "joint", 3).half()
    with torch.no_grad():
        model.unembedding.weight.mul_(40_000)
    assert MultiTokenLoss().eval()(model, random_tokens(2, 9)).nll.isfinite().all()


class Given(HorizonWeights):
    """Weights of somebody else's class."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        return self.values


BAD_NUMBERS: dict[str, Any] = {
    r"weights must hold one number per horizon \(3\), got 2": [1.0, 1.0],
    r"weights must hold one number per horizon \(3\), got 4": [1.0] * 4,
    r"weights\[1\] must be a finite number of at least 0, got -1\.0": [1.0, -1.0, 1.0],
    r"weights\[2\] must be a finite number of at least 0, got nan": [1.0, 1.0, float("nan")],
    r"weights\[0\] must be a finite number of at least 0, got inf": [float("inf"), 1.0, 1.0],
    r"counts must hold one number per horizon \(3\), got shape \(2,\)": torch.tensor([1, 1]),
    r"counts must be at least 0 and finite, got \[1, -1, 1\]": torch.tensor([1, -1, 1]),
    r"counts must be at least 0 and finite, got \[1\.0, nan, 1\.0\]": torch.tensor([1.0, float("nan"), 1.0]),
}


def test_weights_and_counts_that_do_not_fit_are_refused() -> None:
    model, tokens = make_model(), random_tokens(2, 9)
    for sentence, given in BAD_NUMBERS.items():
        name = sentence.partition(" ")[0].partition("\\")[0]
        with pytest.raises(ValueError, match=rf"^MultiTokenLoss: {sentence}\.$"):
            MultiTokenLoss()(model, tokens, **{name: given})
        if name == "weights":
            with pytest.raises(ValueError, match=rf"^Given: {sentence}\.$"):
                MultiTokenLoss(weights=Given(given))(model, tokens)
    terms = MultiTokenLoss()(model, tokens, weights=(1.0, 0.0, 0.5), counts=torch.tensor([0, 1, 2]))
    assert terms.loss.isfinite()


def test_draft_tokens_may_come_in_any_sequence_and_must_differ() -> None:
    model = make_model()
    for good in (torch.tensor([4, 2]), np.array([4, 2]), [np.int64(4), 2], range(2, 6, 2), (torch.tensor(2), 4)):
        model.trim_drafts(good)
        assert model.unembedding.draft_tokens.tolist() == [2, 4]
    twice = "Unembedding: draft tokens must be distinct and at least one, got 3, 2 distinct."
    outside = "Unembedding: draft tokens must lie in 0..10, got {}."
    for bad, sentence in [
        (torch.tensor([1, 1, 3]), twice),
        (np.array([1, 1, 3]), twice),
        ([torch.tensor(1), torch.tensor(1), 3], twice),
        (torch.tensor([1, 11]), outside.format(11)),
        (np.array([-1, 3]), outside.format(-1)),
        (range(9, 12), outside.format(11)),
        (torch.tensor([1.0, 2.0]), "Unembedding: a draft token must be a whole number, got 1.0."),
        (torch.tensor([[1, 2]]), "Unembedding: a draft token must be a whole number, got [1, 2]."),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            model.trim_drafts(bad)
