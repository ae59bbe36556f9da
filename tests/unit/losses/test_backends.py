"""Every backend of linear + cross-entropy against the naive one: values and gradients."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtp_modules import LinearHeads, MTPModel, MultiTokenLoss, RecurrentTrunk
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.losses import FusedLinearCrossEntropy, NaiveLinearCrossEntropy, RecomputeLinearCrossEntropy

BACKENDS: dict[str, Callable[[int | None], LinearCrossEntropy]] = {
    "fused": lambda rows: FusedLinearCrossEntropy(rows_per_chunk=rows),
    "recompute": lambda rows: RecomputeLinearCrossEntropy(rows_per_chunk=rows),
}


def _example(
    seed: int, rows: int, *, bias: bool, teacher: bool
) -> tuple[list[Tensor], Tensor, Tensor, Teacher | None, bool]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [draw(rows, 5), 2 * draw(11, 5)] + ([draw(11)] if bias else [])
    targets = torch.randint(-1, 11, (rows,), generator=generator)
    weights = draw(rows).abs() * (draw(rows) > -0.5)
    share = draw(rows).sigmoid() * (draw(rows) > 0)
    return leaves, targets, weights, Teacher(draw(rows, 5), share) if teacher else None, bias


def _run(
    backend: LinearCrossEntropy, example: tuple[list[Tensor], Tensor, Tensor, Teacher | None, bool]
) -> tuple[CrossEntropyTerms, list[Tensor]]:
    leaves, targets, weights, teacher, _ = example
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    terms = backend(leaves[0], [OutputMatrix(*leaves[1:])], [len(targets)], targets, weights, teacher)
    (1.7 * terms.loss).backward()
    return terms, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", BACKENDS)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    chunk=st.sampled_from([None, 1, 7, 16]),
    bias=st.booleans(),
    teacher=st.booleans(),
)
def test_a_backend_equals_the_naive_one(
    name: str, seed: int, rows: int, chunk: int | None, bias: bool, teacher: bool
) -> None:
    example = _example(seed, rows, bias=bias, teacher=teacher)
    terms, gradients = _run(BACKENDS[name](chunk), example)
    wanted, wanted_gradients = _run(NaiveLinearCrossEntropy(), example)
    torch.testing.assert_close(terms.loss, wanted.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms.nll, wanted.nll, rtol=1e-10, atol=1e-10)
    assert terms.rank.equal(wanted.rank)
    assert terms.predicted.equal(wanted.predicted)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BACKENDS)
def test_only_frozen_inputs_get_no_gradient(name: str) -> None:
    (states, weight), targets, weights, _, _ = _example(0, 9, bias=False, teacher=False)
    weight.requires_grad_()
    BACKENDS[name](4)(states, [OutputMatrix(weight)], [9], targets, weights).loss.backward()
    assert states.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        assert not BACKENDS[name](4)(states, [OutputMatrix(weight)], [9], targets, weights).loss.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_valid_gives_zero(name: str) -> None:
    example = _example(0, 9, bias=True, teacher=True)
    leaves, _, weights, teacher, bias = example
    terms, gradients = _run(BACKENDS[name](4), (leaves, torch.full((9,), -1), weights, teacher, bias))
    assert terms.loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_gradients_accumulate_and_can_be_asked_for_twice() -> None:
    example = _example(3, 20, bias=False, teacher=False)
    leaves = [leaf.clone().requires_grad_() for leaf in example[0]]
    matrices = [OutputMatrix(leaves[1])]
    loss = FusedLinearCrossEntropy(rows_per_chunk=6)(leaves[0], matrices, [20], example[1], example[2]).loss
    loss.backward(retain_graph=True)
    once = leaves[1].grad.clone()
    loss.backward()
    torch.testing.assert_close(leaves[1].grad, 2 * once)


def test_small_weights_survive_float16() -> None:
    (states, weight), targets, _, _, _ = _example(5, 64, bias=False, teacher=False)
    weights = torch.full((64,), 1e-7)
    half = [leaf.half().requires_grad_() for leaf in (states, weight)]
    wide = [leaf.detach().float().requires_grad_() for leaf in half]
    scale = 1e6  # what a gradient scaler multiplies the loss with
    fused = FusedLinearCrossEntropy(rows_per_chunk=16)
    (scale * fused(half[0], [OutputMatrix(half[1])], [64], targets, weights).loss).backward()
    (scale * NaiveLinearCrossEntropy()(wide[0], [OutputMatrix(wide[1])], [64], targets, weights).loss).backward()
    for low, high in zip(half, wide, strict=True):
        error = (low.grad.float() - high.grad).norm() / high.grad.norm()
        assert error < 5e-3


def test_autocast_is_as_close_as_the_naive_path() -> None:
    (states, weight), targets, weights, _, _ = _example(6, 32, bias=False, teacher=False)
    exact = [leaf.float().requires_grad_() for leaf in (states, weight)]
    NaiveLinearCrossEntropy()(exact[0], [OutputMatrix(exact[1])], [32], targets, weights.float()).loss.backward()
    errors = []
    for backend in (NaiveLinearCrossEntropy(), FusedLinearCrossEntropy(rows_per_chunk=8)):
        leaves = [leaf.float().requires_grad_() for leaf in (states, weight)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = backend(leaves[0], [OutputMatrix(leaves[1])], [32], targets, weights.float()).loss
        loss.backward()
        errors.append(max((leaf.grad - e.grad).norm() / e.grad.norm() for leaf, e in zip(leaves, exact, strict=True)))
    assert errors[1] < 1.5 * errors[0] + 1e-3


@pytest.mark.parametrize("backend", [None, NaiveLinearCrossEntropy(), RecomputeLinearCrossEntropy(rows_per_chunk=5)])
def test_the_multi_token_loss_takes_any_backend(backend: LinearCrossEntropy | None) -> None:
    torch.manual_seed(0)
    model = MTPModel(
        trunk=RecurrentTrunk(vocab_size=7, d_model=6), heads=LinearHeads(d_model=6, num_horizons=3)
    ).double()
    tokens = torch.randint(7, (2, 9))
    terms = MultiTokenLoss(backend=backend)(model, tokens)
    wanted = MultiTokenLoss(backend=FusedLinearCrossEntropy(rows_per_chunk=4))(model, tokens)
    torch.testing.assert_close(terms.loss, wanted.loss)
    gradients = torch.autograd.grad(terms.loss, list(model.parameters()), retain_graph=True)
    for got, want in zip(gradients, torch.autograd.grad(wanted.loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [FusedLinearCrossEntropy, RecomputeLinearCrossEntropy])
def test_chunks_hold_at_least_one_row(backend: type[FusedLinearCrossEntropy]) -> None:
    with pytest.raises(ValueError, match=f"{backend.__name__}: rows_per_chunk must be at least 1, got 0."):
        backend(rows_per_chunk=0)
