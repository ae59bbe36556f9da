"""The output matrix."""

import pytest
import torch
from torch import nn

from mtp_modules.core.unembedding import Unembedding
from mtp_modules.losses import FusedLinearCrossEntropy, NaiveLinearCrossEntropy


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


def test_own_matrices_start_like_the_shared_one_and_biases_at_zero() -> None:
    unembedding = Unembedding(64, 1000, bias=True, num_own=2)
    for index in range(3):
        weight, bias = unembedding.matrix(index)
        assert abs(weight.var().item() * 64 - 1) < 0.05
        assert bias is not None
        assert not bias.any()
    assert len({id(unembedding.matrix(index).weight) for index in range(3)}) == 3


@pytest.mark.parametrize("num_own", [0, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_every_horizon_uses_its_matrix(num_own: int, bias: bool) -> None:
    unembedding, states = Unembedding(8, 11, bias=bias, num_own=num_own), torch.randn(4, 2, 8)
    if bias:
        for parameter in (unembedding.bias, *unembedding.own_biases):
            nn.init.normal_(parameter)
    for offset in range(2):
        weight, added = unembedding.matrix(1 + offset)
        expected = states[:, offset] @ weight.T + (0 if added is None else added)
        torch.testing.assert_close(unembedding.logits(states[:, offset], 1 + offset), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_detached_horizons_do_not_train_the_matrix(bias: bool) -> None:
    unembedding, states = Unembedding(8, 11, bias=bias), torch.randn(6, 8, requires_grad=True)
    targets = torch.tensor([1, 5, 10, 0, 2, 3])

    def gradients(count: int, **options: bool) -> list[torch.Tensor]:
        sizes = [2, 2, 2][: count // 2]
        given = states[:count], targets[:count], torch.ones(count), FusedLinearCrossEntropy(rows_per_chunk=3)
        loss = unembedding(*given, sizes=sizes, **options).loss
        return list(torch.autograd.grad(loss, [states, *unembedding.parameters()]))

    detached, near, whole = gradients(6, detach_far=True), gradients(2), gradients(6)
    torch.testing.assert_close(detached[0], whole[0])
    assert len(detached) == 2 + bias
    for got, wanted in zip(detached[1:], near[1:], strict=True):
        torch.testing.assert_close(got, wanted)


def test_own_matrices_cannot_be_detached() -> None:
    unembedding = Unembedding(8, 11, num_own=1)
    sentence = (
        r"^Unembedding: detach_far would leave the output matrices of the horizons beyond the first untrained; "
        r"set it to false: they give horizon 1's matrix no gradient anyway\.$"
    )
    given = torch.randn(2, 8), torch.tensor([1, 2]), torch.ones(2), NaiveLinearCrossEntropy()
    with pytest.raises(ValueError, match=sentence):
        unembedding(*given, sizes=[1, 1], detach_far=True)
