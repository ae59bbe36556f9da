"""Backends at work inside a model: gradients of trunk and heads, scalers, accumulation, the compiler."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mtp_modules import ExplicitWeights, MTPModel, MultiTokenLoss
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.losses import (
    FusedLinearCrossEntropy,
    NaiveLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
    TorchLinearCrossEntropy,
)
from tests.distributed.ranks import run_ranks
from tests.helpers import SCORED, assert_same, covering, gradients, make_model, random_tokens
from tests.unit.losses import compiled

BACKENDS: dict[str, LinearCrossEntropy] = {
    "fused": FusedLinearCrossEntropy(rows_per_chunk=5),
    "recompute": RecomputeLinearCrossEntropy(rows_per_chunk=5),
    "sequential": SequentialLinearCrossEntropy(),
    "torch": TorchLinearCrossEntropy(rows_per_chunk=5),
}
MATRICES = {
    "tied": {"tied": True},
    "untied_bias": {"tied": False, "bias": True},
    "own_bias": {"tied": True, "own": True, "bias": True},
}


def make_loss(name: str, backend: LinearCrossEntropy) -> MultiTokenLoss:
    options = {} if name == "torch" else {"distillation": 0.3, "label_smoothing": 0.1, "z_loss": 0.01}
    return MultiTokenLoss(weights=ExplicitWeights(values=[1.0, 0.5, 0.25]), backend=backend, **options)


@pytest.mark.parametrize(("matrices", "heads", "name"), covering(MATRICES, SCORED, BACKENDS))
def test_all_gradients_of_a_model_equal_the_naive_ones(matrices: str, heads: str, name: str) -> None:
    model, tokens = make_model("gru", heads, 3, **MATRICES[matrices]), random_tokens(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = torch.ones_like(documents, dtype=torch.bool)
    mask[1, 3] = False
    found, wanted = (
        make_loss(name, backend)(model, tokens, document_ids=documents, loss_mask=mask)
        for backend in (BACKENDS[name], NaiveLinearCrossEntropy())
    )
    assert_same(found.loss, wanted.loss)
    assert_same(found.nll, wanted.nll)
    assert found.rank.equal(wanted.rank)
    assert found.agrees.equal(wanted.agrees)
    assert_same(gradients(model, found.loss), gradients(model, wanted.loss))


@pytest.mark.parametrize("name", ["naive", "fused"])
def test_options_change_the_loss_but_not_what_is_logged(name: str) -> None:
    model, tokens = make_model("gru", "linear", 1), random_tokens(2, 9)
    backend = BACKENDS.get(name, NaiveLinearCrossEntropy())
    terms = MultiTokenLoss(backend=backend, label_smoothing=0.2, z_loss=0.3)(model, tokens)
    logits, targets = model.unembedding.logits(model(tokens)[0]).flatten(0, 1), tokens[:, 1:].flatten()
    smooth = F.cross_entropy(logits, targets, label_smoothing=0.2)
    assert_same(terms.loss, smooth + 0.3 * logits.logsumexp(dim=1).square().mean())
    assert_same(terms.nll[0], F.cross_entropy(logits, targets).detach())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("own", [True, False])
def test_float16_under_a_gradient_scaler(name: str, own: bool) -> None:
    """Every token's share of the gradient is below float16's smallest number, the scaled sum is not."""
    model, tokens = make_model("gru", "linear", 3, own=own, bias=own).float(), random_tokens(4, 9)
    weights = ExplicitWeights(values=[1e-5, 1e-5, 1e-5])
    exact = gradients(model, MultiTokenLoss(weights=weights, backend=NaiveLinearCrossEntropy())(model, tokens).loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.float16):
        loss = MultiTokenLoss(weights=weights, backend=BACKENDS[name])(model, tokens).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for key, parameter in model.named_parameters():
        assert (parameter.grad - exact[key]).norm() < 2e-2 * exact[key].norm() + 1e-12, key
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**20  # no overflow was found
    assert all((value != before[key]).any() for key, value in model.state_dict().items())


class LiteralRecipe(LinearCrossEntropy):
    """Call ``backward`` inside forward, head by head, as the founding paper's listing does. Do not do this."""

    def __call__(
        self,
        states: Tensor,
        matrices: list[OutputMatrix],
        sizes: list[int],
        targets: Tensor,
        example_weights: Tensor,
        teacher: Teacher | None = None,
        **options: float,
    ) -> CrossEntropyTerms:
        leaf, parts, naive = states.detach().requires_grad_(), [], NaiveLinearCrossEntropy()
        heads = zip(leaf.split(sizes), matrices, targets.split(sizes), example_weights.split(sizes), strict=True)
        for part, matrix, target, weight in heads:
            terms = naive(part, [matrix], [len(part)], target, weight)
            terms.loss.backward()  # the matrix gets its gradient here, whatever becomes of the loss
            parts.append(terms)
        loss = torch.stack([part.loss.detach() for part in parts]).sum()
        delivered = (states * leaf.grad).sum()
        figures = (torch.cat([part[index] for part in parts]) for index in (1, 2, 3))
        return CrossEntropyTerms(loss + delivered - delivered.detach(), *figures)


def summed(model: MTPModel, backend: LinearCrossEntropy, factors: list[float]) -> dict[str, Tensor]:
    """Return the gradients that accumulate when each micro-batch's loss is multiplied by its factor."""
    model.zero_grad()
    for seed, factor in enumerate(factors):
        (factor * MultiTokenLoss(backend=backend)(model, random_tokens(2, 7, seed=seed)).loss).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def a_scaled_loss(backend: LinearCrossEntropy) -> None:
    model = make_model("gru", "linear", 3)
    assert_same(summed(model, backend, [1e3]), summed(model, NaiveLinearCrossEntropy(), [1e3]))


def accumulated_micro_batches(backend: LinearCrossEntropy) -> None:
    model = make_model("gru", "linear", 3)
    assert_same(summed(model, backend, [0.5, 0.5]), summed(model, NaiveLinearCrossEntropy(), [0.5, 0.5]))


def gradients_by_request(backend: LinearCrossEntropy) -> None:
    model, tokens = make_model("gru", "linear", 3, tied=False), random_tokens(2, 7)
    found, wanted = (
        gradients(model, MultiTokenLoss(backend=one)(model, tokens).loss)
        for one in (backend, NaiveLinearCrossEntropy())
    )
    assert_same(found, wanted)


def a_loss_that_nobody_derives(backend: LinearCrossEntropy) -> None:
    model = make_model("gru", "linear", 3)
    MultiTokenLoss(backend=backend)(model, random_tokens(2, 7))
    assert all(parameter.grad is None for parameter in model.parameters())


USES = [a_scaled_loss, accumulated_micro_batches, gradients_by_request, a_loss_that_nobody_derives]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use", USES)
def test_gradients_are_delivered_as_autograd_s_own(name: str, use: Callable) -> None:
    use(BACKENDS[name])


@pytest.mark.parametrize("use", USES)
def test_backward_inside_forward_is_caught(use: Callable) -> None:
    model, tokens = make_model("gru", "linear", 3), random_tokens(2, 7)
    naive, literal = (
        MultiTokenLoss(backend=backend)(model, tokens).loss for backend in (NaiveLinearCrossEntropy(), LiteralRecipe())
    )
    assert_same(literal, naive)  # the loss alone does not tell
    with pytest.raises(AssertionError):
        use(LiteralRecipe())


@pytest.mark.parametrize("compiler", [pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")])
def test_the_loss_compiles_without_a_break(compiler: str) -> None:
    """In a process of its own: the compiler cannot look into the checker of shapes."""
    run_ranks(compiled.compare, compiler, world_size=1, timeout=150)
