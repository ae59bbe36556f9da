"""The output matrix."""

import torch
from torch import nn

from mtp_modules.core.unembedding import Unembedding
from mtp_modules.losses import NaiveLinearCrossEntropy


def test_a_tied_matrix_is_the_embedding_s_own() -> None:
    embedding = nn.Embedding(11, 8)
    before = embedding.weight.clone()
    unembedding = Unembedding(8, 11, tied_to=embedding)
    unembedding.reset_parameters()
    assert unembedding.weight is embedding.weight
    assert torch.equal(embedding.weight, before)


def test_a_matrix_of_its_own_has_variance_one_over_width() -> None:
    weight = Unembedding(64, 1000).weight
    assert abs(weight.var().item() * 64 - 1) < 0.05


def test_logits_and_loss_use_the_same_matrix() -> None:
    unembedding, states, targets = Unembedding(8, 11), torch.randn(3, 8), torch.tensor([1, 5, 10])
    terms = unembedding(states, targets, torch.ones(3), NaiveLinearCrossEntropy(), sizes=[3])
    expected = -unembedding.logits(states).log_softmax(dim=-1)[torch.arange(3), targets]
    torch.testing.assert_close(terms.nll, expected.detach())
    torch.testing.assert_close(terms.loss, expected.sum())
    assert unembedding.logits(states[None]).shape == (1, 3, 11)
