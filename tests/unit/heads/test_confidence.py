"""Predicted acceptance: its loss against a loop, that drafts do not depend on it, and that decoding goes by it."""

import itertools
import math

import pytest
import torch

from mtp_modules import (
    AutoregressiveDecoder,
    ConfidenceHeads,
    JointHeads,
    LinearHeads,
    MTPModel,
    MultiTokenLoss,
    SpeculativeDecoder,
    TransitionHeads,
)
from mtp_modules.core import Heads
from mtp_modules.core.objective import LinearCrossEntropy, NextTokenTeacher
from mtp_modules.decoders import ConfidentDepth, SamplingParams
from mtp_modules.losses import (
    ExplicitWeights,
    FusedLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    multi_token,
)
from mtp_modules.reports import diagnose
from mtp_modules.reports.diagnosis_page import diagnosis_page
from mtp_modules.reports.diagnosis_tables import tables
from tests.drafting import clock
from tests.helpers import VOCAB, assert_same, float64, gradients, make_model, random_tokens
from tests.reference.targets import future_targets

HORIZONS = 4
WEIGHTS = [1.0, 0.5, 0.0, 2.0]


def naive_loss(
    model: MTPModel, tokens: torch.Tensor, drawn: list[list[int]], *, overlap: bool = False, **extra: torch.Tensor
) -> torch.Tensor:
    """Return the binary cross-entropy of the predictions, one target at a time."""
    states = model(tokens, document_ids=extra.get("document_ids"))
    targets, valid = future_targets(tokens, model.horizons, **extra)
    rows, length, _ = targets.shape
    layer, total = model.heads.to_confidence, torch.zeros((), dtype=torch.float64)
    scores = [model.unembedding.logits(state, index).detach() for index, state in enumerate(states)]
    for index, b in itertools.product(range(1, HORIZONS), range(rows)):
        for t in drawn[b]:
            verified = t + model.horizons[index] - 1
            if not valid[b, t, index] or verified >= length:
                continue
            odds = layer.weight[0] @ states[index][b, t].detach() + layer.bias[0]
            draft, own = scores[index][b, t], scores[0][b, verified]
            accepted = float(draft.argmax() == own.argmax())
            if overlap:
                accepted = sum(
                    min(p, q) for p, q in zip(draft.softmax(0).tolist(), own.softmax(0).tolist(), strict=True)
                )
            scale = WEIGHTS[index] * length / len(drawn[b]) / int(valid[:, :, index].sum())
            total = total - scale * (accepted * odds.sigmoid().log() + (1 - accepted) * (-odds).sigmoid().log())
    return total


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("documents", [False, True])
def test_the_loss_is_the_cross_entropy_of_greedy_acceptance(
    share: float, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model("gru", "confident", HORIZONS, own=True), random_tokens(2, 6 + HORIZONS)
    extra = {"loss_mask": torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.8}
    if documents:
        extra["document_ids"] = (torch.arange(tokens.shape[1]) >= 4).long().expand(2, -1)
    drawn = [[0, 2, 5], [1, 3, 4]] if share < 1 else [list(range(6))] * 2
    monkeypatch.setattr(multi_token, "sample_positions", lambda *_: torch.tensor(drawn))
    loss = MultiTokenLoss(weights=ExplicitWeights(values=WEIGHTS), share_of_positions=share)
    found = loss(model, tokens, **extra)
    model.heads.predicts_acceptance = False
    without = loss(model, tokens, **extra)
    added = naive_loss(model, tokens, drawn, **extra)
    assert added.item() > 0.1
    assert_same(found.loss - without.loss, added)
    wanted, own = (gradients(model, loss) for loss in (without.loss, added))
    for name, gradient in gradients(model, found.loss).items():
        alone = name.startswith("heads.to_confidence")  # all else is trained as without it
        assert_same(gradient, (own if alone else wanted)[name])


@pytest.mark.parametrize("log_acceptance", [False, True])
@pytest.mark.parametrize("backend", [FusedLinearCrossEntropy(rows_per_chunk=5), RecomputeLinearCrossEntropy()])
def test_the_loss_can_be_the_cross_entropy_of_sampled_acceptance(
    backend: LinearCrossEntropy, log_acceptance: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model("gru", "confident", HORIZONS), random_tokens(2, 6 + HORIZONS)
    drawn = [[0, 2, 5], [1, 3, 4]]
    monkeypatch.setattr(multi_token, "sample_positions", lambda *_: torch.tensor(drawn))
    given = {"distillation": 0.5, "total_variation": 0.9, "log_acceptance": log_acceptance, "backend": backend}
    given |= {"weights": ExplicitWeights(values=WEIGHTS), "share_of_positions": 0.5}
    found = MultiTokenLoss(**given, confidence_target="overlap")(model, tokens)
    model.heads.predicts_acceptance = False
    without = MultiTokenLoss(**given)(model, tokens)
    added = naive_loss(model, tokens, drawn, overlap=True)
    assert added.item() > 0.1
    assert_same(found.loss - without.loss, added)
    wanted = gradients(model, added)["heads.to_confidence.weight"]
    assert_same(gradients(model, found.loss)["heads.to_confidence.weight"], wanted)


def test_sampled_acceptance_needs_no_scores_of_a_frozen_horizon_one() -> None:
    inner, tokens = make_model("transformer", "residual", 3), random_tokens(2, 9)
    with float64():
        model = MTPModel(trunk=inner.trunk, heads=ConfidenceHeads(heads=inner.heads))
    loss = MultiTokenLoss(distillation=0.5, total_variation=1.0, confidence_target="overlap")
    wanted = gradients(model, loss(model, tokens).loss)["heads.to_confidence.weight"]
    for part in (model.trunk, model.unembedding):
        part.requires_grad_(False)
    terms = loss(model, tokens)
    assert terms.count[0] == 0
    terms.loss.backward()
    assert_same(model.heads.to_confidence.weight.grad, wanted)


def test_a_target_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"confidence_target must be argmax or overlap, got 'both'\.$"):
        MultiTokenLoss(confidence_target="both")
    with pytest.raises(ValueError, match="set total_variation above 0"):
        MultiTokenLoss(confidence_target="overlap")
    model, tokens = make_model("gru", "confident", 3), random_tokens(2, 9)
    other = NextTokenTeacher(model.trunk(tokens[:, :6]).hidden, model.unembedding.matrix(0), share=0.5)
    with pytest.raises(ValueError, match=r"overlap is that with horizon 1, and another model is the teacher; take"):
        MultiTokenLoss(total_variation=1.0, confidence_target="overlap")(model, tokens, teacher=other)


def test_it_is_trained_beside_a_frozen_trunk() -> None:
    model = make_model("transformer", "confident", 3)
    for part in (model.trunk, model.unembedding):
        part.requires_grad_(False)
    loss = MultiTokenLoss()
    terms = loss(model, random_tokens(2, 9))
    terms.loss.backward()
    assert terms.count[0] > 0
    assert model.heads.to_confidence.weight.grad.abs().min() > 0


def right_after_odd_tokens() -> MTPModel:
    """Build a clock whose drafts are right after odd tokens, and wrong after even ones."""
    whole = clock(3)
    with float64():
        heads = ConfidenceHeads(heads=TransitionHeads(heads=whole.heads, vocab_size=VOCAB, rank=None))
        model = MTPModel(trunk=whole.trunk, heads=heads)
    with torch.no_grad():
        for even in range(0, VOCAB, 2):
            model.unembedding.transition[(even + 5) % VOCAB, even] = 50.0
    return model


def test_it_learns_which_drafts_are_accepted() -> None:
    model, rows = right_after_odd_tokens(), torch.stack([torch.arange(row, row + 30) % VOCAB for row in range(4)])
    for part in (model.trunk, model.unembedding):
        part.requires_grad_(False)
    optimizer = torch.optim.Adam(model.heads.to_confidence.parameters(), lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        MultiTokenLoss()(model, rows).loss.backward()
        optimizer.step()
    found = diagnose(model.eval(), [{"tokens": rows}], [[0, 1]], new_tokens=4, every=1)
    first, second = found.depths
    assert (first.conditional, second.conditional) == (pytest.approx(5 / VOCAB, abs=0.06), 0.0)
    for depth in found.depths:
        assert depth.predicted == pytest.approx(depth.conditional, abs=0.05)
        assert depth.predicted_error < 0.05
        assert {place for place, one in enumerate(depth.predicted_bins) if one.count} <= {0, 9}
    table = next(table for table in tables(found) if table.title == "Predicted acceptance")
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert "The same of the acceptance that the heads predict" in diagnosis_page(found, "")
    spared = SpeculativeDecoder(policy=ConfidentDepth(threshold=0.5, predicted=True))
    stats = spared.generate(model, [[0, 1]], max_new_tokens=20).stats
    assert stats.drafted == stats.accepted  # what would be rejected is not even verified
    assert sum(stats.accepted) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_decoding_stops_in_front_of_what_falls_below_the_threshold(temperature: float, threshold: float) -> None:
    model = make_model("transformer", "confident", HORIZONS).eval()
    options = {"max_new_tokens": 15, "sampling": SamplingParams(temperature=temperature), "seed": 3}
    prompts = [[1, 2, 3], [4]]
    decoder = SpeculativeDecoder(policy=ConfidentDepth(threshold=threshold, predicted=True))
    found = decoder.generate(model, prompts, **options)
    assert found.tokens == AutoregressiveDecoder().generate(model, prompts, **options).tokens
    full = SpeculativeDecoder().generate(model, prompts, **options).stats.drafted
    assert (sum(found.stats.drafted) == sum(full)) == (threshold == 0.0)
    assert (sum(found.stats.drafted) == 0) == (threshold == 1.0)


def test_drafts_tell_their_predicted_acceptance() -> None:
    model = make_model("transformer", "confident", 3).eval()
    heads, states = model.heads, (model.trunk.new_state(1, 9), model.heads.new_state(1, 9))
    heads.extend(model.trunk(torch.tensor([[1, 2]]), state=states[0]).hidden, states[1])
    states[1].commit([2])
    given = {"embed": model.trunk.embedding, "unembed": model.unembedding.logits}
    draft = heads.draft(torch.tensor([5]), states[1], num_drafts=2, **given)
    text = torch.tensor([[1, 2, 5, *draft.tokens[0].tolist()]])
    for depth, state in enumerate(model(text)[1:]):
        odds = (heads.to_confidence.weight[0] @ state[0, 1] + heads.to_confidence.bias[0]).item()
        assert draft.confidence[0, depth].item() == pytest.approx(1 / (1 + math.exp(-odds)))


def test_one_horizon_predicts_nothing() -> None:
    heads = ConfidenceHeads(heads=LinearHeads(d_model=8, num_horizons=1))
    assert not heads.predicts_acceptance
    assert heads.confidence(torch.zeros(1, 1, 8)) is None
    assert [name for name, _ in heads.named_parameters()] == ["heads.maps.0.weight"]


def linear() -> Heads:
    return LinearHeads(d_model=8, num_horizons=3)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ConfidenceHeads: heads must have no confidence yet, got ConfidenceHeads"):
        ConfidenceHeads(heads=ConfidenceHeads(heads=linear()))
    with pytest.raises(ValueError, match=r"^ConfidenceHeads: heads must have one state per horizon, but JointHeads"):
        ConfidenceHeads(heads=JointHeads(d_model=8, num_horizons=3, num_components=2))
    sentence = (
        r"^ConfidentDepth: predicted is true, but LinearHeads predict no acceptance; train "
        r"ConfidenceHeads\(heads=LinearHeads\(\.\.\.\)\), or leave it out\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        SpeculativeDecoder(policy=ConfidentDepth(predicted=True)).generate(
            make_model("gru", "linear", 3), [[1]], max_new_tokens=2
        )
