"""Laws of the multi-token loss."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from mtp_modules import AuxiliaryWeights, ExplicitWeights, GeometricWeights, MultiTokenLoss, UniformWeights
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy
from mtp_modules.losses import NaiveLinearCrossEntropy, multi_token
from tests.helpers import HEADS, SCORED, TRUNKS_WITH_HEADS, VOCAB, assert_same, gradients, make_model, random_tokens
from tests.reference import loss as naive
from tests.reference import targets as naive_targets

LK = {"distillation": 0.5, "total_variation": 0.7, "log_acceptance": True}
HYBRID = {"distillation": 0.9, "total_variation": 1.0, "lk_eta": 3.0}


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict, torch.Tensor, dict]:
    """Draw the arguments of a model, with tokens, documents and a mask for it."""
    arguments = {
        "trunk": draw(st.sampled_from(["transformer_grouped", "gru"])),
        "heads": draw(st.sampled_from(list(SCORED))),
        "num_horizons": draw(st.integers(1, 4)),
        "tied": draw(st.booleans()),
        "own": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "draft_tokens": draw(st.sampled_from([None, None, [0, 2, 3, 7, 9], [4]])),
    }
    rows, length = draw(st.integers(1, 3)), arguments["num_horizons"] + draw(st.integers(1, 5))

    def table(values: st.SearchStrategy) -> torch.Tensor:
        row = st.lists(values, min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))

    extra = {
        "document_ids": table(st.integers(0, 1)) if draw(st.booleans()) else None,
        "loss_mask": table(st.booleans()) if draw(st.booleans()) else None,
    }
    return arguments, random_tokens(rows, length, seed=draw(st.integers(0, 99))), extra


@settings(max_examples=2 * settings.default.max_examples)
@given(
    batches(),
    st.sampled_from(
        [{}, {"distillation": 0.3}, {"distillation": 1.0}, {"distillation": 0.9, "total_variation": 0.8}, LK, HYBRID]
    ),
    st.lists(st.sampled_from([0.0, 0.4, 1.0, 2.5]), min_size=4, max_size=4),
)
def test_the_loss_equals_the_naive_triple_loop(batch: tuple, imitation: dict, values: list[float]) -> None:
    arguments, tokens, extra = batch
    model = make_model(**arguments)
    weights = [1.0, *values][: len(model.horizons)]
    terms = MultiTokenLoss(weights=ExplicitWeights(values=weights), **imitation)(model, tokens, **extra)
    expected = naive.multi_token_loss(model, tokens, weights, **imitation, **extra)
    assert_same(terms.loss, expected)
    if expected.requires_grad:
        assert_same(gradients(model, terms.loss), gradients(model, expected))


@given(batches())
def test_what_metrics_need_equals_the_naive_triple_loop(batch: tuple) -> None:
    arguments, tokens, extra = batch
    model = make_model(**arguments)
    weights = ExplicitWeights(values=[1.0, *[0.0] * (len(model.horizons) - 1)])  # what is logged is unweighted
    terms = MultiTokenLoss(weights=weights)(model, tokens, **extra)
    targets, valid = naive_targets.future_targets(tokens, model.horizons, **extra)
    states = model(tokens, document_ids=extra["document_ids"])
    logits = torch.stack([model.unembedding.logits(state, index) for index, state in enumerate(states)], dim=2)
    rows, length, num_horizons = targets.shape
    sums = torch.zeros(num_horizons, dtype=torch.float64)
    counted = torch.zeros(num_horizons, dtype=torch.long)
    for b, t in itertools.product(range(rows), range(length)):
        known = True
        for index, h in enumerate(model.horizons):
            verified = t + h - 1
            known = known and bool(valid[b, t, index]) and verified < length
            if verified < length:
                agrees = logits[b, t, index].argmax() == logits[b, verified, 0].argmax()
                assert terms.agrees[b, t, index] == agrees
            if valid[b, t, index]:
                own = logits[b, t, index, targets[b, t, index]]
                if own == -torch.inf:  # no draft token: wrong, however many guesses are allowed
                    assert terms.rank[b, t, index] == VOCAB
                    continue
                assert terms.rank[b, t, index] == (logits[b, t, index] > own).sum()
                sums[index] -= logits[b, t, index].log_softmax(dim=0)[targets[b, t, index]].detach()
                counted[index] += 1
        assert terms.comparable[b, t] == known
    assert torch.equal(terms.valid, valid)
    assert torch.equal(terms.count, counted)
    assert_same(terms.nll, sums / terms.count.clamp(min=1))


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
def test_one_horizon_is_cross_entropy(trunk: str, heads: str) -> None:
    model, tokens = make_model(trunk, heads, 1), random_tokens(2, 7)
    terms = MultiTokenLoss()(model, tokens)
    logits = model.unembedding.logits(model(tokens)[0])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert_same(terms.loss, expected)
    assert_same(gradients(model, terms.loss), gradients(model, expected))
    assert terms.agrees.all()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("training", [{}, {"distillation": 0.5, "share_of_positions": 0.5}], ids=["plain", "all"])
def test_nothing_to_learn_gives_zero_and_zero_gradients(heads: str, training: dict) -> None:
    model, tokens = make_model("transformer", heads, 3), random_tokens(2, 8)
    terms = MultiTokenLoss(**training)(model, tokens, loss_mask=torch.zeros_like(tokens, dtype=torch.bool))
    assert terms.loss == 0
    assert terms.count.tolist() == [0, 0, 0]
    assert terms.nll.tolist() == [0, 0, 0]
    assert not terms.comparable.any()
    for gradient in gradients(model, terms.loss).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("weights", "values"),
    [
        (None, [1, 1, 1]),
        (UniformWeights(preserve_total=True), [1 / 3, 1 / 3, 1 / 3]),
        (GeometricWeights(gamma=0.5), [1, 0.5, 0.25]),
        (GeometricWeights(gamma=0.5, preserve_total=True), [4 / 7, 2 / 7, 1 / 7]),
        (GeometricWeights(gamma=0.0), [1, 0, 0]),
        (AuxiliaryWeights(weight=0.1), [1, 0.1, 0.1]),
        (AuxiliaryWeights(weight=0.2, decay=0.5), [1, 0.2, 0.2 * math.exp(-2)]),
        (ExplicitWeights(values=[0, 2, 0.5]), [0, 2, 0.5]),
    ],
    ids=["none", "uniform", "geometric", "geometric_total", "zero", "auxiliary", "decaying", "explicit"],
)
def test_the_loss_is_the_weighted_sum_of_the_logged_losses(weights: object, values: list[float]) -> None:
    terms = MultiTokenLoss(weights=weights)(make_model(), random_tokens(2, 9))
    assert_same(terms.loss, (terms.nll * torch.tensor(values, dtype=torch.float64)).sum())


@pytest.mark.parametrize("heads", SCORED)
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_share_of_positions_is_unbiased(heads: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all draws of 2 of 4 positions in 2 rows is the loss on all positions, gradients included."""
    model, tokens = make_model("gru", heads, 3), random_tokens(2, 7)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if masked:
        mask[0, 2:5], mask[1, 6] = False, False
    subsets = list(itertools.combinations(range(4), 2))
    loss = MultiTokenLoss(share_of_positions=0.5, distillation=0.3)
    total = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(subsets, repeat=2):
        monkeypatch.setattr(multi_token, "sample_positions", lambda *_, drawn=drawn: torch.tensor(drawn))
        terms = loss(model, tokens, loss_mask=mask)
        assert terms.rank.shape == (2, 2, 3)
        total = total + terms.loss / len(subsets) ** 2
    expected = loss.eval()(model, tokens, loss_mask=mask).loss
    assert_same(total, expected)
    assert_same(gradients(model, total), gradients(model, expected))


def test_evaluation_uses_every_position() -> None:
    model, tokens = make_model(), random_tokens(2, 9)
    loss = MultiTokenLoss(share_of_positions=0.5)
    assert loss(model, tokens).valid.shape == (2, 3, 3)
    everywhere = loss.eval()(model, tokens)
    assert everywhere.valid.shape == (2, 6, 3)
    assert_same(everywhere.loss, MultiTokenLoss()(model, tokens).loss)


@given(batches(), st.randoms(use_true_random=False))
def test_a_share_of_positions_tells_metrics_of_those_positions(batch: tuple, random: object) -> None:
    arguments, tokens, extra = batch
    model = make_model(**arguments)
    drawn = torch.tensor([[random.randrange(tokens.shape[1] - model.lookahead)] for _ in tokens])
    whole = MultiTokenLoss()(model, tokens, **extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_token, "sample_positions", lambda *_: drawn)
        part = MultiTokenLoss(share_of_positions=0.1)(model, tokens, **extra)
    rows = torch.arange(len(tokens))[:, None]
    for name in ("rank", "valid", "comparable"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows, drawn])
    known = part.comparable
    assert torch.equal(part.agrees[known], whole.agrees[rows, drawn][known])


@pytest.mark.parametrize("heads", HEADS)
def test_distillation_gives_no_gradient_through_the_teacher(heads: str) -> None:
    """With the teacher alone, what learns is the horizons beyond the first; horizon 1's own map must not move."""
    model, tokens = make_model("transformer", heads, 2), random_tokens(2, 8)
    weights = ExplicitWeights(values=[0.0, 1.0])
    loss = MultiTokenLoss(weights=weights, distillation=1.0)(model, tokens, loss_mask=torch.arange(8).expand(2, -1) < 7)
    own_parts = {"linear": "heads.maps.0.", "parallel": "heads.layers.0."}
    found = gradients(model, loss.loss)
    if heads in own_parts:
        first = [gradient for name, gradient in found.items() if name.startswith(own_parts[heads])]
        assert first
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in first)
    assert any(gradient.abs().sum() > 0 for name, gradient in found.items() if name.startswith("heads."))


class Watching(LinearCrossEntropy):
    """Passes on to the naive backend, and looks at the teacher first."""

    def __call__(self, *arguments: object, **options: float) -> CrossEntropyTerms:
        assert arguments[0].requires_grad
        assert not arguments[-1].states.requires_grad
        return NaiveLinearCrossEntropy()(*arguments, **options)


@pytest.mark.parametrize("heads", HEADS)
def test_every_backend_gets_a_detached_teacher(heads: str) -> None:
    MultiTokenLoss(distillation=0.5, backend=Watching())(make_model("gru", heads, 3), random_tokens(2, 8))


def test_a_student_that_equals_its_teacher_does_not_learn() -> None:
    """Cross-entropy against one's own distribution has gradient zero in the logits."""
    model, tokens = make_model("rnn", "linear", 2), random_tokens(1, 2 + 2, seed=3)
    with torch.no_grad():
        hidden = model.trunk(tokens[:, :2]).hidden[0]
        goal = model.heads.maps[0].weight @ hidden[1]
        model.heads.maps[1].weight.copy_(goal[:, None] * hidden[0] / hidden[0].dot(hidden[0]))
    mask = torch.tensor([[True, True, True, False]])  # horizon 2 counts at position 0 only, and is verified at 1
    loss = MultiTokenLoss(weights=ExplicitWeights(values=[0.0, 1.0]), distillation=1.0)
    found = gradients(model, loss(model, tokens, loss_mask=mask).loss)
    assert_same(found, {name: torch.zeros_like(gradient) for name, gradient in found.items()})
