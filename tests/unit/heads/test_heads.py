"""Each kind of heads against its equation, and what all of them refuse."""

import pytest
import torch
from torch import Tensor

from mtp_modules import LinearHeads, ParallelHeads, RecurrentHeads, ResidualHeads
from mtp_modules.core import Heads
from tests.helpers import HEADS, WIDTH, assert_same, make_heads, make_trunk
from tests.reference import transformer as naive

KINDS = {
    LinearHeads: {"d_model": 8, "num_horizons": 2},
    ParallelHeads: {"d_model": 8, "num_horizons": 2, "num_heads": 2, "max_positions": 6},
    RecurrentHeads: {"d_model": 8, "num_horizons": 2, "width": 4, "embedding_width": 3},
    ResidualHeads: {"d_model": 8, "num_horizons": 2, "num_layers": 2},
}


def random_hidden(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64)


def test_linear_heads_are_matrices() -> None:
    heads, hidden = make_heads("linear", 3), random_hidden(2, 4)
    for state, linear in zip(heads(hidden), heads.maps, strict=True):
        assert_same(state, hidden @ linear.weight.T)


def test_linear_heads_start_as_rotations() -> None:
    for linear in LinearHeads(d_model=8, num_horizons=2).maps:
        torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(8))


def test_parallel_heads_are_layers_under_one_norm() -> None:
    heads, hidden = make_heads("parallel", 3), random_hidden(2, 4)
    for state, layer in zip(heads(hidden), heads.layers, strict=True):
        for b in range(2):
            assert_same(state[b], naive.rms_norm(naive.transformer_layer(layer, hidden[b]), heads.norm.weight))


def test_recurrent_heads_walk_with_the_tokens_between() -> None:
    heads, hidden, future = make_heads("recurrent", 3), random_hidden(1, 4), torch.randn(1, 4, 2, WIDTH).double()
    states = heads(hidden, future=future)
    assert states[0] is hidden
    for t in range(4):
        walked = hidden[0, t]
        for depth in range(2):
            read = heads.from_state.weight @ walked
            inner = read + heads.from_token.weight @ future[0, t, depth] + heads.depth_bias[depth]
            walked = walked + heads.out.weight @ (inner / (1 + (-inner).exp()))
            walked = naive.rms_norm(walked, heads.norm.weight)
            assert_same(states[depth + 1][0, t], walked)


def test_residual_heads_add_gated_maps() -> None:
    heads, hidden = make_heads("residual", 3), random_hidden(2, 4)
    states = heads(hidden)
    assert states[0] is hidden
    for state, stack in zip(states[1:], heads.stacks, strict=True):
        x = hidden
        for block in stack:
            inner = x @ block.linear.weight.T + block.linear.bias
            x = x + inner / (1 + (-inner).exp())
        assert_same(state, x)


def test_residual_heads_start_as_horizon_1_and_learn() -> None:
    heads, hidden = ResidualHeads(d_model=8, num_horizons=4, num_layers=2), torch.randn(2, 5, 8)
    states = heads(hidden)
    assert all(torch.equal(state, hidden) for state in states)
    sum(state.sum() for state in states).backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in heads.parameters())


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num_horizons", [1, 2, 3, 4])
def test_one_state_a_horizon(name: str, num_horizons: int) -> None:
    heads = make_heads(name, num_horizons)
    future = torch.randn(2, 5, num_horizons - 1, WIDTH).double()
    assert heads.horizons == tuple(range(1, num_horizons + 1))
    goes_on = isinstance(heads, RecurrentHeads) and num_horizons > 1
    assert heads.max_drafts == (None if goes_on else num_horizons - 1)
    assert [state.shape for state in heads(random_hidden(2, 5), future=future)] == [(2, 5, WIDTH)] * num_horizons


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, sizes in KINDS.items() for name in sizes])
def test_sizes_must_be_at_least_one(kind: type, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {name} must be at least 1, got 0\.$"):
        kind(**{**KINDS[kind], name: 0})


def draft(heads: Heads, state: object, num_drafts: int) -> None:
    token, embedding = torch.zeros(1, dtype=torch.long), torch.zeros(11, WIDTH).double()
    heads.draft(
        token, state, num_drafts=num_drafts, embed=lambda ids: embedding[ids], unembed=lambda x, _: x @ embedding.T
    )


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num_drafts", [0, -1])
def test_heads_draft_at_least_one_token(name: str, num_drafts: int) -> None:
    heads = make_heads(name, 3)
    with pytest.raises(
        ValueError, match=rf"^{type(heads).__name__}: num_drafts must be at least 1, got {num_drafts}\.$"
    ):
        draft(heads, heads.new_state(1, 5), num_drafts)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "recurrent"])
def test_heads_draft_one_token_a_horizon_beyond_the_first(name: str) -> None:
    heads = make_heads(name, 3)
    sentence = rf"^{type(heads).__name__}: num_drafts must lie in 1\.\.2 for 3 horizons, got 3\.$"
    with pytest.raises(ValueError, match=sentence):
        draft(heads, heads.new_state(1, 5), 3)


@pytest.mark.parametrize("name", HEADS)
def test_the_state_must_be_these_heads_own(name: str) -> None:
    heads, other = make_heads(name, 3), make_trunk("gru").new_state(1, 5)
    sentence = rf"^{type(heads).__name__}: state must come from these heads' new_state, got RecurrentState\.$"
    with pytest.raises(ValueError, match=sentence):
        heads.extend(random_hidden(1, 2), other)
    with pytest.raises(ValueError, match=sentence):
        draft(heads, other, 1)


def test_recurrent_heads_need_the_future() -> None:
    with pytest.raises(
        ValueError, match=r"^RecurrentHeads: future is missing; pass the embeddings of the tokens between"
    ):
        make_heads("recurrent", 2)(random_hidden(1, 2))


def test_parallel_heads_read_at_most_max_positions() -> None:
    heads = ParallelHeads(**KINDS[ParallelHeads])
    sentence = (
        "^ParallelHeads: a sequence of 7 tokens is longer than max_positions=6; shorten it or build the heads with"
    )
    with pytest.raises(ValueError, match=sentence):
        heads(torch.zeros(1, 7, 8))
    with pytest.raises(ValueError, match=sentence):
        heads.extend(torch.zeros(1, 7, 8), heads.new_state(1, 20))


def test_one_recurrent_horizon_is_the_plain_next_token_model() -> None:
    heads = RecurrentHeads(d_model=4, num_horizons=1)
    assert list(heads.parameters()) == []
    heads.reset_parameters()
    hidden = torch.randn(2, 3, 4)
    assert heads(hidden) == (hidden,)
