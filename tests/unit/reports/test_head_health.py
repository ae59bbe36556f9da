"""Accuracy, dead heads, untouched parameters and gradients: against plain loops and known models."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules import ParallelHeads, RecurrentHeads
from mtp_modules.core import future_targets
from mtp_modules.reports.head_health import (
    Accuracy,
    accuracies,
    gradient_cosines,
    heads_without_input,
    untouched_parameters,
)
from tests.helpers import make_model, random_tokens, randomise


@pytest.mark.parametrize("heads", ["linear", "recurrent"])
def test_accuracies_are_those_of_all_logits(heads: str) -> None:
    model = make_model("transformer", heads, 3)
    tokens = random_tokens(4, 23)
    documents = torch.tensor([[0] * 23, [0] * 9 + [1] * 14, [0] * 23, [0] * 23])
    found = accuracies(model, [{"tokens": tokens[:2], "document_ids": documents[:2]}, {"tokens": tokens[2:]}])
    targets, valid = future_targets(tokens, model.horizons, documents)
    with torch.no_grad():
        states = model(tokens, document_ids=documents)
    for index, score in enumerate(found):
        counted = valid[:, :, index]
        logits, wanted = model.unembedding.logits(states[index], index)[counted], targets[:, :, index][counted]
        assert score.horizon == index + 1
        assert score.count == len(wanted)
        assert score.loss == pytest.approx(F.cross_entropy(logits, wanted).item())
        assert score.top1 == pytest.approx((logits.argmax(dim=1) == wanted).double().mean().item())
        assert score.top5 == pytest.approx((logits.topk(5).indices == wanted[:, None]).any(1).double().mean().item())
        assert score.most_frequent == pytest.approx(wanted.bincount().max().item() / len(wanted))


def test_a_head_beats_the_baseline_by_more_than_two_standard_errors() -> None:
    def beats(top1: float, count: int) -> bool:
        return Accuracy(horizon=2, loss=1.0, top1=top1, top5=1.0, most_frequent=0.5, count=count).beats_baseline

    found = [beats(0.5, 10_000), beats(0.505, 10_000), beats(0.52, 10_000), beats(0.52, 100)]
    assert found == [False, False, True, False]


@pytest.mark.parametrize("heads", ["linear", "parallel", "recurrent"])
def test_only_a_head_without_input_is_constant(heads: str) -> None:
    model = make_model("gru", heads, 3, own=True)
    batch = {"tokens": random_tokens(2, 20)}
    assert heads_without_input(model, batch) == []
    with torch.no_grad():
        model.unembedding.own_weights[1].zero_()
    assert heads_without_input(model, batch) == [3]


def test_parameters_at_their_initial_value_are_named() -> None:
    heads = RecurrentHeads(d_model=8, num_horizons=4)
    assert untouched_parameters(heads) == ["depth_bias", "norm.weight"]
    randomise(heads)
    before = torch.get_rng_state()
    assert untouched_parameters(heads) == []
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        heads.depth_bias[1] = 0
    assert untouched_parameters(heads) == ["depth_bias[1]"]


def test_an_untrained_layer_is_named_by_its_gains() -> None:
    heads = ParallelHeads(d_model=8, num_horizons=3, num_heads=2, max_positions=16)
    randomise(heads)
    heads.layers[2].reset_parameters()
    for module in heads.layers[2].modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert {name.rpartition(".")[0] for name in untouched_parameters(heads)} == {
        "layers.2.attention_norm",
        "layers.2.ffn_norm",
    }


@pytest.mark.parametrize("trunk", ["transformer", "lstm"])
def test_gradient_cosines_are_those_of_plain_losses(trunk: str) -> None:
    model, tokens = make_model(trunk, "linear", 3), random_tokens(3, 15)
    model.trunk.embedding.requires_grad_(False)
    none, *found = gradient_cosines(model, {"tokens": tokens})
    assert none is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "trunk.embedding.weight"
    ]
    model.requires_grad_(True)
    targets, _ = future_targets(tokens, model.horizons)
    parameters, flat = list(model.trunk.parameters()), []
    for index in range(3):
        logits = model.unembedding.logits(model(tokens)[index], index)
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, :, index].flatten())
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        flat.append(torch.cat([part.flatten() for part in parts]))
    for index, cosine in enumerate(found, start=1):
        assert cosine == pytest.approx(F.cosine_similarity(flat[0], flat[index], dim=0).item(), abs=1e-8)
