"""Every backend of linear + cross-entropy against the loop over examples: values and gradients."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtp_modules.core.objective import LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.losses import (
    FusedLinearCrossEntropy,
    NaiveLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
    TorchLinearCrossEntropy,
    fused,
)
from tests.helpers import assert_same, covering
from tests.reference.linear_cross_entropy import linear_cross_entropy

WIDTH, VOCAB = 5, 11
BACKENDS: dict[str, Callable[[int | None], LinearCrossEntropy]] = {
    "naive": lambda _: NaiveLinearCrossEntropy(),
    "fused": lambda rows: FusedLinearCrossEntropy(rows_per_chunk=rows),
    "recompute": lambda rows: RecomputeLinearCrossEntropy(rows_per_chunk=rows),
    "sequential": lambda _: SequentialLinearCrossEntropy(),
    "torch": lambda rows: TorchLinearCrossEntropy(rows_per_chunk=rows),
}
PLAIN_ONLY = {"torch"}  # no label smoothing, no z-loss, no teacher
LAYOUTS = ("shared", "own", "detached", "mixed")


@dataclass
class Example:
    """The arguments of a backend, made anew for every call from the same numbers."""

    states: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    layout: str
    sizes: list[int]
    targets: Tensor
    example_weights: Tensor
    teacher: Teacher | None
    options: dict[str, float]

    def leaves(self) -> list[Tensor]:
        return [leaf.clone().requires_grad_() for leaf in (self.states, *self.weights, *self.biases)]

    def arguments(self, leaves: list[Tensor]) -> tuple:
        weights, biases = leaves[1 : 1 + len(self.weights)], leaves[1 + len(self.weights) :] or [None] * len(self.sizes)
        own = [OutputMatrix(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        far = OutputMatrix(own[0].weight.detach(), None if own[0].bias is None else own[0].bias.detach())
        matrices = {
            "shared": [own[0]] * len(own),
            "own": own,
            "detached": [own[0], *[far] * (len(own) - 1)],
            "mixed": [own[index] if index % 2 else own[0] for index in range(len(own))],
        }[self.layout]
        return leaves[0], matrices, self.sizes, self.targets, self.example_weights, self.teacher


def make_example(
    seed: int = 0,
    sizes: tuple[int, ...] = (9, 6, 6),
    layout: str = "shared",
    *,
    bias: bool = True,
    taught: bool = False,
    outside: bool = False,
    total_variation: float = 0.0,
    log_acceptance: bool = False,
    lk_eta: float = 0.0,
    vocab_size: int = VOCAB,
    **options: float,
) -> Example:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, far = sum(sizes), sum(sizes[1:])
    measure, teacher = (total_variation, log_acceptance, lk_eta), None
    if outside:  # another model, of another width, which teaches every horizon
        matrix = OutputMatrix(draw(vocab_size, WIDTH - 2), draw(vocab_size) if bias else None)
        teacher = Teacher(draw(rows, WIDTH - 2), draw(rows).sigmoid(), matrix, 1.7, *measure)
    elif taught:
        share = draw(far).sigmoid() * (draw(far) > 0)
        teacher = Teacher(draw(far, WIDTH), share, None, 1.0, *measure)
    return Example(
        states=draw(rows, WIDTH),
        weights=[draw(vocab_size, WIDTH) for _ in sizes],
        biases=[draw(vocab_size) for _ in sizes] if bias else [],
        layout=layout,
        sizes=list(sizes),
        targets=torch.randint(-1, vocab_size, (rows,), generator=generator),
        example_weights=draw(rows).abs() * (draw(rows) > -0.5),
        teacher=teacher,
        options=options,
    )


def run(backend: Callable, example: Example) -> tuple[tuple, list[Tensor]]:
    leaves = example.leaves()
    terms = backend(*example.arguments(leaves), **example.options)
    return terms, list(torch.autograd.grad(1.7 * terms[0], leaves, allow_unused=True, materialize_grads=True))


def assert_equal_to_the_loop(backend: LinearCrossEntropy, example: Example) -> None:
    terms, gradients = run(backend, example)
    (loss, nll, rank, predicted), wanted = run(linear_cross_entropy, example)
    assert_same(terms.loss, loss)
    assert_same(terms.nll, torch.tensor(nll, dtype=torch.float64))
    assert (terms.rank.tolist(), terms.predicted.tolist()) == (rank, predicted)
    assert_same(gradients, wanted)


@pytest.mark.parametrize("name", BACKENDS)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any).map(tuple),
    layout=st.sampled_from(LAYOUTS),
    chunk=st.sampled_from([None, 1, 4, 7]),
    bias=st.booleans(),
    teacher=st.sampled_from([{}, {"taught": True}, {"outside": True}]),
    total_variation=st.sampled_from([0.0, 0.4, 1.0]),
    of_variation=st.sampled_from([{}, {"log_acceptance": True}, {"lk_eta": 3.0}]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.3]),
)
def test_a_backend_equals_the_loop_over_examples(
    name: str,
    seed: int,
    sizes: tuple,
    layout: str,
    chunk: int | None,
    bias: bool,
    teacher: dict[str, bool],
    total_variation: float,
    of_variation: dict[str, float],
    **options: float,
) -> None:
    if name in PLAIN_ONLY:
        teacher, options = {}, {}
    measure = {"total_variation": total_variation, **of_variation}
    example = make_example(seed, sizes, layout, bias=bias, **measure, **teacher, **options)
    assert_equal_to_the_loop(BACKENDS[name](chunk), example)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocab_size", [1024, 1151, 1153])
def test_large_vocabularies_equal_the_loop_too(name: str, vocab_size: int) -> None:
    """Their likeliest token is found block by block, and ties go to the first."""
    example = make_example(sizes=(5, 4), vocab_size=vocab_size)
    place = torch.arange(9) * 125
    example.states.zero_()
    for row, token in enumerate((place % vocab_size).tolist()):
        example.weights[0][token] = 0
        example.biases[0][token] = 50.0 + row // 2  # in pairs
    assert_equal_to_the_loop(BACKENDS[name](4), example)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_valid_gives_zero_and_zero_gradients(name: str, layout: str) -> None:
    options = {} if name in PLAIN_ONLY else {"taught": True, "label_smoothing": 0.1, "z_loss": 0.1}
    example = make_example(layout=layout, **options)
    example.targets.fill_(-1)
    terms, gradients = run(BACKENDS[name](4), example)
    assert terms.loss.item() == 0
    assert not terms.nll.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_examples_give_zero(name: str) -> None:
    terms = BACKENDS[name](4)(*make_example(sizes=(0, 0)).arguments(make_example(sizes=(0, 0)).leaves()))
    assert terms.loss.item() == 0
    assert [len(value) for value in terms[1:4]] == [0, 0, 0]


@pytest.mark.parametrize("name", BACKENDS)
def test_only_what_is_trained_gets_a_gradient(name: str) -> None:
    example = make_example(bias=False)
    leaves = [example.states, example.weights[0].requires_grad_(), *example.weights[1:]]
    BACKENDS[name](4)(*example.arguments(leaves)).loss.backward()
    assert leaves[0].grad is None
    assert leaves[1].grad is not None
    with torch.no_grad():
        assert not BACKENDS[name](4)(*example.arguments(leaves)).loss.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_can_be_asked_for_twice(name: str) -> None:
    example = make_example(layout="mixed")
    leaves = example.leaves()
    loss = BACKENDS[name](4)(*example.arguments(leaves)).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    twice = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    assert_same(once, twice, tolerance=0)


@pytest.mark.parametrize("name", ["fused", "sequential"])
def test_weights_cannot_be_learned_where_gradients_are_made_in_forward(name: str) -> None:
    example = make_example()
    example.example_weights.requires_grad_()
    backend = BACKENDS[name](None)
    sentence = (
        rf"^{type(backend).__name__}: example_weights requires a gradient, which this backend does not make; "
        r"detach it, or use RecomputeLinearCrossEntropy to learn the weights\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        backend(*example.arguments(example.leaves()))


@pytest.mark.parametrize("name", ["naive", "recompute", "torch"])
def test_weights_can_be_learned_elsewhere(name: str) -> None:
    example = make_example()
    example.example_weights.requires_grad_()
    terms = BACKENDS[name](4)(*example.arguments(example.leaves()))
    (gradient,) = torch.autograd.grad(terms.loss, [example.example_weights])
    assert_same(gradient, terms.nll)


def relative_errors(backend: Callable, example: Example, dtype: torch.dtype, *, autocast: bool) -> list[float]:
    """Return how far loss and gradients are from those of the loop in float64, relative to their norms."""
    _, exact = run(linear_cross_entropy, example)
    leaves = [leaf.detach().to(torch.float32 if autocast else dtype).requires_grad_() for leaf in example.leaves()]
    arguments = list(example.arguments(leaves))
    arguments[4] = example.example_weights.float()
    if example.teacher is not None:
        states, share = example.teacher.states.to(leaves[0].dtype), example.teacher.share.float()
        arguments[5] = Teacher(states, share, total_variation=example.teacher.total_variation)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = backend(*arguments, **example.options).loss
    found = torch.autograd.grad(1.7 * loss, leaves, allow_unused=True, materialize_grads=True)
    return [
        ((one.double() - other).norm() / other.norm()).item()
        for one, other in zip(found, exact, strict=True)
        if other.any()
    ]


PRECISIONS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "mixed": (torch.bfloat16, True)}


@pytest.mark.parametrize(
    ("name", "layout", "precision", "emulated"),
    covering([name for name in BACKENDS if name != "naive"], ("shared", "own"), PRECISIONS, (True, False)),
)
def test_low_precision_is_as_close_as_the_naive_path(
    name: str, layout: str, precision: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, autocast = PRECISIONS[precision]
    monkeypatch.setattr(fused, "_EMULATED", {torch.bfloat16} if emulated else set())
    options = {} if name in PLAIN_ONLY else {"taught": True, "label_smoothing": 0.1, "z_loss": 0.01}
    example = make_example(3, (60, 40, 40), layout, **options)
    found = relative_errors(BACKENDS[name](16), example, dtype, autocast=autocast)
    naive = relative_errors(NaiveLinearCrossEntropy(), example, dtype, autocast=autocast)
    for error, wanted in zip(found, naive, strict=True):
        assert error < 2 * wanted + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("emulated", [True, False])
def test_small_weights_survive_float16(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_EMULATED", {torch.float16} if emulated else set())
    example = make_example(5, (64,), bias=False)
    weights = torch.full((64,), 1e-7)
    half = [leaf.detach().half().requires_grad_() for leaf in example.leaves()]
    wide = [leaf.detach().float().requires_grad_() for leaf in half]
    scale = 1e6  # what a gradient scaler multiplies the loss with
    for backend, leaves in ((FusedLinearCrossEntropy(rows_per_chunk=16), half), (NaiveLinearCrossEntropy(), wide)):
        (scale * backend(leaves[0], [OutputMatrix(leaves[1])], [64], example.targets, weights).loss).backward()
    for low, high in zip(half, wide, strict=True):
        assert (low.grad.float() - high.grad).norm() / high.grad.norm() < 5e-3


@pytest.mark.parametrize("backend", [FusedLinearCrossEntropy, RecomputeLinearCrossEntropy, TorchLinearCrossEntropy])
def test_chunks_hold_at_least_one_row(backend: type[FusedLinearCrossEntropy]) -> None:
    with pytest.raises(ValueError, match=f"^{backend.__name__}: rows_per_chunk must be at least 1, got 0.$"):
        backend(rows_per_chunk=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sizes", [[9, 6], [9, 6, 5]], ids=str)
def test_sizes_must_fit(name: str, sizes: list[int]) -> None:
    arguments = list(make_example().arguments(make_example().leaves()))
    arguments[2] = sizes
    sentence = f"sizes must hold one number for each of 3 matrices and sum to 21 examples, got {sizes}."
    with pytest.raises(ValueError, match=f"LinearCrossEntropy: {re.escape(sentence)}$"):
        BACKENDS[name](4)(*arguments)


@pytest.mark.parametrize(
    ("option", "name"),
    [({"label_smoothing": 0.1}, "label_smoothing"), ({"z_loss": 0.1}, "z_loss"), ({"taught": True}, "teacher")],
    ids=["label_smoothing", "z_loss", "teacher"],
)
def test_torch_s_function_lacks_some_options(option: dict, name: str) -> None:
    sentence = (
        rf"^TorchLinearCrossEntropy: {name} is not possible with torch's function; leave it out, or use another "
        r"backend\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        run(TorchLinearCrossEntropy(), make_example(**option))


def test_an_older_torch_lacks_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions")
    sentence = (
        r"^TorchLinearCrossEntropy: torch \S+ has no linear_cross_entropy with chunks; install torch 2\.13 or later, "
        r"or use FusedLinearCrossEntropy\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        TorchLinearCrossEntropy()


def test_the_logarithm_of_the_acceptance_is_finite_and_steep_where_nothing_is_accepted() -> None:
    states = torch.tensor([[40.0, 0.0]], requires_grad=True)
    matrix = OutputMatrix(torch.eye(2))
    targets, weights, slopes = torch.tensor([0]), torch.ones(1), []
    for log_acceptance in (False, True):
        teacher = Teacher(torch.tensor([[0.0, 40.0]]), torch.ones(1), None, 1.0, 1.0, log_acceptance)
        loss = FusedLinearCrossEntropy()(states, [matrix], [1], targets, weights, teacher).loss
        assert loss.isfinite()
        slopes.append(torch.autograd.grad(loss, states)[0].abs().max().item())
    assert slopes[1] > 1e4 * slopes[0]


@given(seed=st.integers(0, 10_000), eta=st.floats(0.1, 30.0))
def test_the_hybrid_lies_between_its_parts(seed: int, eta: float) -> None:
    """Near cross-entropy where nothing is accepted and eta is small, and total variation where eta is large."""

    def loss(**measure: float) -> float:
        return FusedLinearCrossEntropy()(
            *(example := make_example(seed, taught=True, **measure)).arguments(example.leaves())
        ).loss.item()

    crossed, distance = loss(), loss(total_variation=1.0)
    low, high = sorted((crossed, distance))
    assert low - 1e-12 <= loss(total_variation=1.0, lk_eta=eta) <= high + 1e-12
    assert abs(loss(total_variation=1.0, lk_eta=1e-12) - crossed) < 1e-9
    assert abs(loss(total_variation=1.0, lk_eta=1e9) - distance) < 1e-9


def test_total_variation_is_what_a_sampled_draft_is_rejected_with() -> None:
    """And its gradient vanishes where the distributions are one; a distribution against its opposite costs 1."""
    states = torch.eye(2, dtype=torch.float64).mul(40)
    matrix = OutputMatrix(torch.eye(2, dtype=torch.float64))
    for told, wanted in ((states, 0.0), (states.flip(0), 1.0)):
        teacher = Teacher(told, torch.ones(2, dtype=torch.float64), total_variation=1.0)
        leaf = states.clone().requires_grad_()
        targets, weights = torch.tensor([0, 1]), torch.full((2,), 0.5, dtype=torch.float64)
        terms = FusedLinearCrossEntropy()(leaf, [matrix], [2], targets, weights, teacher)
        assert abs(terms.loss.item() - wanted) < 1e-15
        assert_same(torch.autograd.grad(terms.loss, leaf), [torch.zeros_like(states)], tolerance=1e-15)


@pytest.mark.parametrize("gap", [15.0, 30.0, 60.0])
@pytest.mark.parametrize("name", ["naive", "fused", "recompute"])
def test_the_logarithm_of_acceptance_has_a_gradient_where_hardly_a_draft_is_accepted(name: str, gap: float) -> None:
    """In float32, down to overlaps of 1e-26."""
    generator = torch.Generator().manual_seed(0)
    draft, own = torch.randn(2, 1, 50, generator=generator, dtype=torch.float64)
    draft[0, 0] += gap
    own[0, 1] += gap
    exact = draft.clone().requires_grad_()
    least = torch.minimum(exact.log_softmax(-1), own.log_softmax(-1))
    (-least.logsumexp(-1)).sum().backward()
    states, matrix = draft.float().requires_grad_(), OutputMatrix(torch.eye(50))
    teacher = Teacher(own.float(), torch.ones(1), matrix, total_variation=1.0, log_acceptance=True)
    BACKENDS[name](4)(states, [matrix], [1], torch.tensor([3]), torch.ones(1), teacher).loss.backward()
    assert exact.grad.norm() > 0.1
    torch.testing.assert_close(states.grad.double(), exact.grad, atol=1e-4, rtol=1e-3)
