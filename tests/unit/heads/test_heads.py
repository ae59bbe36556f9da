"""Each kind of heads against its equation, and what all of them refuse."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import LinearHeads, ParallelHeads, RecurrentHeads, ResidualHeads, SequentialHeads
from mtp_modules.core import Heads
from tests.helpers import HEADS, WIDTH, assert_same, float64, make_heads, make_trunk, randomise
from tests.reference import transformer as naive

KINDS = {
    LinearHeads: {"d_model": 8, "num_horizons": 2},
    ParallelHeads: {"d_model": 8, "num_horizons": 2, "num_heads": 2, "max_positions": 6},
    RecurrentHeads: {"d_model": 8, "num_horizons": 2, "width": 4, "embedding_width": 3},
    ResidualHeads: {"d_model": 8, "num_horizons": 2, "num_layers": 2},
    SequentialHeads: {"d_model": 8, "num_horizons": 2, "num_heads": 2, "max_positions": 6, "embedding_width": 3},
}


REPEATED = ("recurrent", "sequential_shared")
"""Heads that can draft on and on."""


def random_hidden(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("documents", [False, True])
def test_horizon_one_alone_is_what_forward_returns_first(name: str, documents: bool) -> None:
    heads, hidden, future = make_heads(name, 3), random_hidden(2, 6), torch.randn(2, 6, 2, WIDTH).double()
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]]) if documents else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        first = heads.first(hidden, document_ids=ids)
    assert_same(first, heads(hidden, future=future, document_ids=ids)[0])
    assert counter.get_total_flops() == 2 * heads.flops(6, 0)


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


def naive_chain(heads: SequentialHeads, hidden: Tensor, future: Tensor) -> list[Tensor]:
    """Return the states of all horizons of one sequence by the paper's equations."""
    chain, states = hidden, [hidden]
    for index in range(heads.num_horizons - 1):
        step = heads.steps[0 if heads.shared else index]
        parts = [
            naive.rms_norm(future[:, index], step.token_norm.weight),
            naive.rms_norm(chain, step.state_norm.weight),
        ]
        joined = torch.cat(parts if step.embedding_first else parts[::-1], dim=-1) @ step.merge.weight.T
        chain = naive.transformer_layer(step.layer, joined)
        states.append(naive.rms_norm(chain, heads.norms[min(index, len(heads.norms) - 1)].weight))
        chain = states[-1] if heads.chain_norm else chain
    return states


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chain_norm", [False, True])
@pytest.mark.parametrize("embedding_first", [False, True])
@pytest.mark.parametrize("shared_norm", [False, True])
def test_sequential_heads_are_the_paper_s_chain(
    shared: bool, chain_norm: bool, embedding_first: bool, shared_norm: bool
) -> None:
    options = {"shared": shared, "chain_norm": chain_norm, "embedding_first": embedding_first}
    with float64():
        heads = SequentialHeads(
            d_model=WIDTH, num_horizons=4, num_heads=2, ffn_width=12, shared_norm=shared_norm, **options
        )
    randomise(heads)
    assert len(heads.steps) == (1 if shared else 3)
    assert len(heads.norms) == (1 if shared or shared_norm else 3)
    hidden, future = random_hidden(2, 5), torch.randn(2, 5, 3, WIDTH).double()
    states = heads(hidden, future=future)
    assert states[0] is hidden
    for b in range(2):
        for state, expected in zip(states, naive_chain(heads, hidden[b], future[b]), strict=True):
            assert_same(state[b], expected)


def test_sequential_heads_need_the_tokens_ahead_of_every_position() -> None:
    heads, positions = make_heads("sequential", 2), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(
        ValueError,
        match=r"^SequentialHeads: future holds the tokens ahead of 2 positions, but the modules attend to all of them; "
        r"pass it for all 5, whatever positions are wanted\.$",
    ):
        heads(random_hidden(1, 5), future=torch.randn(1, 2, 1, WIDTH).double(), positions=positions)


def test_sequential_heads_need_the_tokens_that_they_read() -> None:
    heads = make_heads("sequential", 2)
    with pytest.raises(
        ValueError,
        match=r"^SequentialHeads: tokens and embed are missing; pass the chunk's tokens and the trunk's embedding\.$",
    ):
        heads.extend(random_hidden(1, 2), heads.new_state(1, 5))
    hidden = random_hidden(1, 2)
    plain = heads.new_state(1, 5, for_drafts=False)
    assert heads.extend(hidden, plain) is hidden
    with pytest.raises(ValueError, match=r"^SequentialHeads: the state was made with for_drafts=False; make one for"):
        draft(heads, plain, 1)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num_horizons", [1, 2, 3, 4])
def test_one_state_a_horizon(name: str, num_horizons: int) -> None:
    heads = make_heads(name, num_horizons)
    future = torch.randn(2, 5, num_horizons - 1, WIDTH).double()
    assert heads.horizons == tuple(range(1, num_horizons + 1))
    goes_on = name in REPEATED and num_horizons > 1
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


@pytest.mark.parametrize("name", [name for name in HEADS if name not in REPEATED])
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


@pytest.mark.parametrize("name", ["recurrent", "sequential"])
def test_heads_that_read_the_future_need_it(name: str) -> None:
    heads = make_heads(name, 2)
    sentence = rf"^{type(heads).__name__}: future is missing; pass the embeddings of the tokens between"
    with pytest.raises(ValueError, match=sentence):
        heads(random_hidden(1, 2))


@pytest.mark.parametrize("kind", [ParallelHeads, SequentialHeads])
def test_heads_with_layers_read_at_most_max_positions(kind: type) -> None:
    heads = kind(**KINDS[kind])
    sentence = (
        f"^{kind.__name__}: a sequence of 7 tokens is longer than max_positions=6; shorten it or build the heads with"
    )
    with pytest.raises(ValueError, match=sentence):
        heads(torch.zeros(1, 7, 8), future=torch.zeros(1, 7, 1, 3))


def test_one_recurrent_horizon_is_the_plain_next_token_model() -> None:
    heads = RecurrentHeads(d_model=4, num_horizons=1)
    assert list(heads.parameters()) == []
    heads.reset_parameters()
    hidden = torch.randn(2, 3, 4)
    assert heads(hidden) == (hidden,)
