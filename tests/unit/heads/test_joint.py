"""The joint distribution: its loss, its conditionals and its drafts against sums over components and all texts."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import ExplicitWeights, JointHeads, MTPModel, MultiTokenLoss, RecurrentTrunk
from mtp_modules.core import MixtureStates
from mtp_modules.core.mixture import marginal_logits
from mtp_modules.core.objective import LinearCrossEntropy, NextTokenTeacher, OutputMatrix
from mtp_modules.decoders import DraftedBeamDecoder
from mtp_modules.losses import (
    FusedLinearCrossEntropy,
    NaiveLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
    multi_token,
)
from mtp_modules.reports.head_health import heads_without_input
from mtp_modules.training import MTPModule
from tests.helpers import (
    VOCAB,
    WIDTH,
    assert_same,
    gradients,
    log_probs_of,
    make_heads,
    make_model,
    make_trunk,
    random_tokens,
)
from tests.reference.targets import future_targets

BACKENDS: dict[str, LinearCrossEntropy] = {
    "naive": NaiveLinearCrossEntropy(),
    "fused": FusedLinearCrossEntropy(rows_per_chunk=5),
    "recompute": RecomputeLinearCrossEntropy(rows_per_chunk=4),
    "sequential": SequentialLinearCrossEntropy(),
}


def naive_loss(
    model: MTPModel, tokens: Tensor, weights: list[float], positions: Tensor | None = None, **extra: Any
) -> Tensor:
    """Sum over horizons of weight times the mean of what their tokens cost given those before."""
    all_probs = log_probs_of(model, tokens, extra.get("document_ids"))
    targets, valid = future_targets(tokens, model.horizons, **extra)
    rows, length, _ = targets.shape
    total = torch.zeros((), dtype=torch.float64)
    for index, weight in enumerate(weights):
        for b, t in itertools.product(range(rows), range(length)):
            drawn = index == 0 or positions is None or t in positions[b].tolist()
            if valid[b, t, index] and drawn:
                scale = 1.0 if index == 0 or positions is None else length / positions.shape[1]
                cost = -all_probs[index][b, t, targets[b, t, index]]
                total = total + weight * scale * cost / valid[:, :, index].sum()
    return total


@given(data=st.data())
def test_the_loss_is_the_joint_distribution_s_likelihood(data: st.DataObject) -> None:
    own = data.draw(st.booleans(), label="own")
    num_horizons = data.draw(st.integers(1, 4), label="H")
    model = make_model("gru", "joint", num_horizons, own=own, bias=own, seed=data.draw(st.integers(0, 9)))
    rows, length = data.draw(st.integers(1, 2)), num_horizons + data.draw(st.integers(1, 4))
    tokens = random_tokens(rows, length, seed=data.draw(st.integers(0, 99)))
    extra: dict[str, Tensor] = {}
    if data.draw(st.booleans(), label="documents"):
        extra["document_ids"] = torch.randint(2, (rows, length)).sort(dim=1).values
    if data.draw(st.booleans(), label="mask"):
        extra["loss_mask"] = torch.rand(rows, length) < 0.7
    values = [1.0, 0.0, 2.5, 0.4][:num_horizons]
    positions = None
    with pytest.MonkeyPatch.context() as patch:
        share = 1.0
        if data.draw(st.booleans(), label="share"):
            share, positions = 0.1, torch.randint(length - num_horizons, (rows, 1))
            patch.setattr(multi_token, "sample_positions", lambda *_: positions)
        backend = BACKENDS[data.draw(st.sampled_from(list(BACKENDS)), label="backend")]
        loss = MultiTokenLoss(weights=ExplicitWeights(values=values), backend=backend, share_of_positions=share)
        found = loss(model, tokens, **extra)
    wanted = naive_loss(model, tokens, values, positions, **extra)
    assert_same(found.loss, wanted)
    if wanted.requires_grad:
        assert_same(gradients(model, found.loss), gradients(model, wanted))


def test_at_equal_weights_the_loss_is_that_of_whole_texts() -> None:
    """The horizons' terms telescope to the likelihood of all tokens together, a sum over components of products."""
    model, tokens = make_model("gru", "joint", 4), random_tokens(2, 9)
    terms, states = MultiTokenLoss()(model, tokens), model(tokens)
    assert isinstance(states, MixtureStates)
    total = torch.zeros(())
    for b, t in itertools.product(range(2), range(5)):
        probability = torch.zeros(())
        for r in range(3):
            product = states.log_weights[b, t, r].exp()
            for k in range(3):
                probs = model.unembedding.logits(states.components[b, t, k, r], k + 1).softmax(dim=0)
                product = product * probs[tokens[b, t + 2 + k]]
            probability = probability + product
        total = total - probability.log() / 10
    assert_same(terms.loss - terms.nll[0], total, tolerance=1e-9)
    assert_same(terms.nll[1:].sum(), total.detach(), tolerance=1e-9)


def test_a_frozen_horizon_1_is_not_scored_in_training() -> None:
    model, loss = make_model("transformer", "joint"), MultiTokenLoss()
    model.trunk.requires_grad_(False)
    model.unembedding.requires_grad_(False)
    tokens = random_tokens(2, 9)
    trained, whole = loss.train()(model, tokens), loss.eval()(model, tokens)
    assert (trained.nll[0], trained.count[0]) == (0, 0)
    assert whole.count[0] > 0
    assert_same(trained.nll[1:], whole.nll[1:])
    assert_same(trained.loss, whole.nll[1:].sum())
    trained_slopes = torch.autograd.grad(trained.loss, list(model.heads.parameters()))
    for one, other in zip(trained_slopes, torch.autograd.grad(whole.loss, list(model.heads.parameters())), strict=True):
        assert_same(one, other)


def test_what_metrics_need_is_that_of_the_mixture() -> None:
    model, tokens = make_model("transformer", "joint", 3), random_tokens(2, 9)
    tokens_and_ids = {"document_ids": torch.tensor([[0] * 5 + [1] * 4, [0] * 9])}
    mask = torch.rand(2, 9) < 0.6
    terms = MultiTokenLoss().eval()(model, tokens, loss_mask=mask, **tokens_and_ids)
    with torch.inference_mode():
        without = MultiTokenLoss()(model, tokens, loss_mask=mask, **tokens_and_ids)
    all_probs = log_probs_of(model, tokens, **tokens_and_ids)
    targets, valid = future_targets(tokens, model.horizons, loss_mask=mask, **tokens_and_ids)
    nll = torch.zeros(3, dtype=torch.float64)
    for b, t, index in itertools.product(range(2), range(6), range(3)):
        probs = all_probs[index][b, t].detach()
        verified = t + index
        if verified < 6:
            assert terms.agrees[b, t, index] == (probs.argmax() == all_probs[0][b, verified].argmax())
        if valid[b, t, index]:
            assert terms.rank[b, t, index] == (probs > probs[targets[b, t, index]]).sum()
            nll[index] -= probs[targets[b, t, index]]
    assert_same(terms.nll, nll / terms.count.clamp(min=1))
    assert_same(without.loss, terms.loss.detach())
    assert_same(without.nll, terms.nll)


def test_drafts_multiply_to_the_joint_distribution() -> None:
    """Over all texts of two drafts, the product of the distributions they are drawn from is the sum over components."""
    model = make_model("gru", "joint", 3).eval()
    text, last = [3, 1, 4], 5
    states = model(torch.tensor([[*text, last, 0, 0]]))
    assert isinstance(states, MixtureStates)
    weights = states.log_weights[0, 2].exp()
    first, second = (
        model.unembedding.logits(states.components[0, 2, k], k + 1).softmax(dim=-1).detach() for k in range(2)
    )
    wanted = torch.einsum("r,rx,ry->xy", weights.detach(), first, second)
    own = model.heads.new_state(1, 5)
    model.heads.extend(model.trunk(torch.tensor([text])).hidden, own)
    own.commit([3])
    found = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for token in range(VOCAB):

        def sampler(logits: Tensor, token: int = token) -> tuple[Tensor, None]:
            return torch.tensor([token]), None

        sampler.done = False
        draft = model.heads.draft(
            torch.tensor([last]),
            own,
            num_drafts=2,
            embed=model.trunk.embedding,
            unembed=model.unembedding.logits,
            sampler=sampler,
        )
        all_probs = draft.logits[0].softmax(dim=-1).detach()
        found[token] = all_probs[0, token] * all_probs[1]
    assert_same(found, wanted)
    assert_same(wanted.sum(), torch.ones((), dtype=torch.float64))


def test_the_marginal_distribution_averages_over_the_tokens_between() -> None:
    model, tokens = make_model("gru", "joint", 3), random_tokens(2, 7)
    states = model(tokens)
    found = marginal_logits(states, 2, model.unembedding.logits).softmax(dim=-1)
    wanted = torch.zeros_like(found)
    for t in range(4):
        for between in range(VOCAB):
            text = torch.cat((tokens[:, : t + 2], torch.full((2, 1), between), tokens[:, :1]), dim=1)
            all_probs = log_probs_of(model, text)
            wanted.view(2, 4, -1)[:, t] += all_probs[1][:, t, between, None].exp() * all_probs[2][:, t].exp()
    assert_same(found, wanted)
    assert_same(
        marginal_logits(states, 2, model.unembedding.logits, most=3),
        marginal_logits(states, 2, model.unembedding.logits)[:3],
    )


def test_predictions_are_the_most_likely_tokens_of_the_marginal_distributions() -> None:
    heads = make_heads("joint", 3)
    model = MTPModule(trunk=make_trunk("gru"), heads=heads, loss=MultiTokenLoss())
    tokens = random_tokens(2, 8)
    predicted = model.predict_step({"tokens": tokens}, 0)["predicted"]
    states = model.model(tokens)
    for index in range(3):
        probs = marginal_logits(states, index, model.model.unembedding.logits).view(2, 5, VOCAB)
        assert torch.equal(predicted[:, :, index], probs.argmax(dim=-1))
    assert heads_without_input(model.model.eval(), {"tokens": tokens}) == []
    with torch.no_grad():
        model.model.unembedding.weight.zero_()
    assert heads_without_input(model.model, {"tokens": tokens}) == [1, 2, 3]


def test_one_component_is_heads_that_do_not_see_one_another() -> None:
    heads = JointHeads(d_model=WIDTH, num_horizons=3, num_components=1).double()
    model = MTPModel(trunk=RecurrentTrunk(vocab_size=VOCAB, d_model=WIDTH).double(), heads=heads)
    tokens = random_tokens(2, 8)
    states = model(tokens)
    plain = [states.first, *states.components[:, :, :, 0].unbind(dim=2)]
    for found, state, index in zip(log_probs_of(model, tokens), plain, range(3), strict=True):
        assert_same(found, model.unembedding.logits(state, index).log_softmax(dim=-1))


@pytest.mark.parametrize("masked", [False, True])
def test_balance_is_the_spread_of_the_mean_weights(masked: bool) -> None:
    model, tokens = make_model("gru", "joint", 3), random_tokens(2, 8)
    extra = {"document_ids": torch.tensor([[0, 1] * 4, [0] * 8])} if masked else {}
    plain, balanced = (MultiTokenLoss(balance=balance)(model, tokens, **extra) for balance in (0.0, 0.7))
    weights = model(tokens, **extra).log_weights.exp()
    mean = weights[1].mean(dim=0) if masked else weights.flatten(0, 1).mean(dim=0)
    wanted = 0.7 * (mean / mean.mean()).var(correction=0)
    assert_same(balanced.loss - plain.loss, wanted)
    assert_same(gradients(model, balanced.loss - plain.loss), gradients(model, wanted))
    assert_same(balanced.nll, plain.nll)


def test_nothing_to_learn_gives_zero_and_zero_gradients() -> None:
    model, tokens = make_model("transformer", "joint", 3), random_tokens(2, 8)
    loss = MultiTokenLoss(balance=0.5)
    terms = loss(model, tokens, loss_mask=torch.zeros_like(tokens, dtype=torch.bool))
    assert terms.loss == 0
    assert terms.nll.tolist() == [0, 0, 0]
    assert all(not gradient.any() for gradient in gradients(model, terms.loss).values())


def test_the_formula_of_operations_is_what_runs() -> None:
    heads, hidden = make_heads("joint", 3), torch.randn(2, 6, WIDTH).double()
    positions, future = torch.tensor([[0, 2], [1, 5]]), torch.randn(2, 2, 2, WIDTH).double()
    with FlopCounterMode(display=False) as counter:
        heads(hidden, future=future, positions=positions)
    assert counter.get_total_flops() == 2 * heads.flops(6, 2)
    assert heads.states_scored == 2 * 3
    assert make_heads("joint", 1).flops(6, 2) == 0


def test_future_is_needed() -> None:
    with pytest.raises(ValueError, match=r"^JointHeads: future is missing; pass the embeddings of the next tokens"):
        make_heads("joint", 2)(torch.zeros(1, 3, WIDTH).double())


@pytest.mark.parametrize("name", ["d_model", "num_horizons", "num_components", "width", "embedding_width"])
def test_sizes_must_be_at_least_one(name: str) -> None:
    sizes = {"d_model": 8, "num_horizons": 2, "num_components": 2}
    with pytest.raises(ValueError, match=rf"^JointHeads: {name} must be at least 1, got 0\.$"):
        JointHeads(**{**sizes, name: 0})


def test_another_state_is_refused() -> None:
    heads = make_heads("joint", 2)
    with pytest.raises(ValueError, match=r"^JointHeads: state must come from these heads' new_state, got KeyValue"):
        heads.read(torch.zeros(1, 2, WIDTH).double(), make_model().trunk.new_state(1, 4))


@pytest.mark.parametrize("option", ["distillation", "label_smoothing", "z_loss"])
def test_losses_that_a_joint_distribution_has_not_are_refused(option: str) -> None:
    model = make_model("gru", "joint", 2)
    sentence = rf"^MultiTokenLoss: {option} is 0\.5, but JointHeads do not support it; set it to 0\.$"
    with pytest.raises(ValueError, match=sentence):
        MultiTokenLoss(**{option: 0.5})(model, random_tokens(1, 6))


def test_other_inputs_and_teachers_are_refused() -> None:
    model, tokens = make_model("gru", "joint", 2), random_tokens(1, 6)
    sentence = r"^MultiTokenLoss: {} is given, but JointHeads do not support it; leave it out\.$"
    with pytest.raises(ValueError, match=sentence.format("inputs")):
        MultiTokenLoss()(model, tokens, inputs=tokens)
    teacher = NextTokenTeacher(torch.zeros(1, 4, WIDTH), OutputMatrix(torch.zeros(VOCAB, WIDTH)), 0.5)
    with pytest.raises(ValueError, match=sentence.format("a teacher")):
        MultiTokenLoss()(model, tokens, teacher=teacher)


def test_balance_needs_components() -> None:
    with pytest.raises(ValueError, match=r"^MultiTokenLoss: balance must be at least 0, got -1\.$"):
        MultiTokenLoss(balance=-1)
    sentence = r"^MultiTokenLoss: balance is 0\.5, but LinearHeads have no components; set it to 0\.$"
    with pytest.raises(ValueError, match=sentence):
        MultiTokenLoss(balance=0.5)(make_model(), random_tokens(1, 6))


def test_beams_cannot_use_the_drafts() -> None:
    decoder = DraftedBeamDecoder(num_beams=2)
    with pytest.raises(
        ValueError, match=r"^JointHeads: a draft's distribution is a mixture, .* use BeamDecoder, or call"
    ):
        decoder.generate(make_model("transformer", "joint", 3).eval(), [[1, 2]], max_new_tokens=5)
