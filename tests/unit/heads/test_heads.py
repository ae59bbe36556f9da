"""Each kind of heads against its equation, and what all of them refuse."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import (
    ChainedHeads,
    ConditionedHeads,
    EarlyExitHeads,
    FusedFeatureHeads,
    LinearHeads,
    ParallelHeads,
    RecurrentHeads,
    ResidualHeads,
    SequentialHeads,
)
from mtp_modules.core import Heads, TrunkOutput
from tests.helpers import HEADS, WIDTH, assert_same, float64, make_heads, make_trunk, randomise
from tests.reference import transformer as naive

KINDS = {
    ChainedHeads: {"d_model": 8, "num_horizons": 2, "num_heads": 2, "max_positions": 6},
    ConditionedHeads: {"d_model": 8, "num_horizons": 2, "width": 4, "num_layers": 1, "embedding_width": 3},
    EarlyExitHeads: {"d_model": 8, "num_horizons": 2, "num_features": 1},
    LinearHeads: {"d_model": 8, "num_horizons": 2, "stride": 1},
    ParallelHeads: {"d_model": 8, "num_horizons": 2, "num_heads": 2, "max_positions": 6, "stride": 1},
    RecurrentHeads: {"d_model": 8, "num_horizons": 2, "width": 4, "embedding_width": 3},
    ResidualHeads: {"d_model": 8, "num_horizons": 2, "num_layers": 2, "stride": 1},
    SequentialHeads: {"d_model": 8, "num_horizons": 2, "num_heads": 2, "max_positions": 6, "embedding_width": 3},
}


REPEATED = ("recurrent", "sequential_shared")
"""Heads that can draft on and on."""


def random_hidden(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64)


def features(heads: Heads, rows: int, length: int) -> dict[str, tuple[Tensor, ...]]:
    """Return outputs of inner layers, if the heads read them."""
    states = tuple(random_hidden(rows, length) for _ in range(heads.num_features))
    return heads.features_of(TrunkOutput(random_hidden(rows, length), states))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (RecurrentHeads, {}),
        (SequentialHeads, {"num_heads": 2}),
        (FusedFeatureHeads, {"num_heads": 2}),
        (EarlyExitHeads, {"num_features": 2, "num_layers": 0}),
    ],
)
def test_far_states_start_at_the_scale_that_is_asked_for(kind: type[Heads], more: dict[str, int]) -> None:
    heads = kind(d_model=WIDTH, num_horizons=3, norm_gain=2.5, **more).double()
    future = torch.randn(2, 6, 2, WIDTH, dtype=torch.float64) if heads.reads_future else None
    states = heads(random_hidden(2, 6), future=future, **features(heads, 2, 6))
    for state in states[1:]:
        assert_same(state.square().mean(dim=-1).sqrt(), torch.full((2, 6), 2.5, dtype=torch.float64), tolerance=1e-4)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("documents", [False, True])
def test_horizon_one_alone_is_what_forward_returns_first(name: str, documents: bool) -> None:
    heads, hidden, future = make_heads(name, 3), random_hidden(2, 6), torch.randn(2, 6, 2, WIDTH).double()
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]]) if documents else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        first = heads.first(hidden, document_ids=ids)
    given = features(heads, 2, 6)
    assert_same(first, heads(hidden, future=future, document_ids=ids, **given)[0])
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


@pytest.mark.parametrize("order", ["causal", "anticausal"])
def test_chained_heads_read_one_another(order: str) -> None:
    heads, hidden = make_heads(order, 3), random_hidden(2, 4)
    states = heads(hidden)
    for b in range(2):
        x = hidden[b]
        for index in (0, 1, 2) if order == "causal" else (2, 1, 0):
            x = naive.transformer_layer(heads.layers[index], x)
            assert_same(states[index][b], naive.rms_norm(x, heads.norm.weight))


def test_chained_heads_know_two_orders() -> None:
    with pytest.raises(ValueError, match=r"^ChainedHeads: order must be one of causal, anticausal, got 'acausal'\.$"):
        ChainedHeads(d_model=8, num_horizons=2, num_heads=2, order="acausal")


@pytest.mark.parametrize("order", ["causal", "anticausal"])
def test_a_state_without_drafts_holds_the_layers_up_to_horizon_1(order: str) -> None:
    state = make_heads(order, 3).new_state(1, 5, for_drafts=False)
    assert state.keys_values.num_layers == (1 if order == "causal" else 3)


@pytest.mark.parametrize("order", ["causal", "anticausal"])
def test_far_chained_heads_spare_the_trunk_and_train_all_their_layers(order: str) -> None:
    heads, hidden = make_heads(order, 3), random_hidden(1, 4).requires_grad_()
    states, detached = heads(hidden), heads(hidden, far_hidden=hidden.detach())
    assert_same(detached, states)
    far = (sum(state.sum() for state in found[1:]) for found in (states, detached))
    wanted, found = (torch.autograd.grad(s, list(heads.parameters()), allow_unused=True) for s in far)
    assert sum(gradient is not None for gradient in wanted) > 10
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other)
    assert torch.autograd.grad(heads(hidden, far_hidden=hidden.detach())[2].sum(), hidden, allow_unused=True) == (None,)
    assert torch.autograd.grad(heads(hidden, far_hidden=hidden.detach())[0].sum(), hidden)[0].abs().min() > 0


def test_conditioned_heads_join_the_state_with_all_tokens_between() -> None:
    heads, hidden, future = make_heads("conditioned", 4), random_hidden(1, 3), torch.randn(1, 3, 3, WIDTH).double()
    states = heads(hidden, future=future)
    assert states[0] is hidden
    for t in range(3):
        for index in range(3):
            step, block = heads.steps[index], heads.stacks[index][0]
            read = torch.cat([hidden[0, t], *(future[0, t, place] for place in range(index + 1))])
            inner = step.join.weight @ read + step.join.bias
            x = hidden[0, t] + step.out.weight @ (inner / (1 + (-inner).exp()))
            inner = block.linear.weight @ x + block.linear.bias
            assert_same(states[index + 1][0, t], x + inner / (1 + (-inner).exp()))


def test_early_exits_are_blocks_of_a_normalised_layer() -> None:
    heads, hidden = make_heads("early_exit", 4), random_hidden(2, 3)
    given = features(heads, 2, 3)["features"]
    states = heads(hidden, features=given)
    assert states[0] is hidden
    assert heads.exits == [1, 1, 0]
    for state, (norm, block), exit_ in zip(states[1:], heads.stacks, heads.exits, strict=True):
        for b in range(2):
            x = naive.rms_norm(given[exit_][b], norm.weight)
            inner = x @ block.linear.weight.T + block.linear.bias
            assert_same(state[b], x + inner / (1 + (-inner).exp()))


@pytest.mark.parametrize(
    ("num_horizons", "num_features", "exits"),
    [(1, 3, []), (2, 1, [0]), (2, 3, [2]), (3, 3, [2, 1]), (4, 3, [2, 1, 0]), (7, 3, [2, 2, 1, 1, 0, 0])],
)
def test_exits_are_shared_out_evenly_the_deepest_first(num_horizons: int, num_features: int, exits: list[int]) -> None:
    heads = EarlyExitHeads(d_model=8, num_horizons=num_horizons, num_features=num_features)
    assert heads.exits == exits


@pytest.mark.parametrize("exits", [[0], [0, 2], [-1, 0], [0, 0, 0]])
def test_every_further_horizon_exits_at_a_layer_that_is_there(exits: list[int]) -> None:
    sentence = (
        r"^EarlyExitHeads: exits must name one of the layers 0\.\.1 for each of 2 horizons beyond the first, got \["
    )
    with pytest.raises(ValueError, match=sentence):
        EarlyExitHeads(d_model=8, num_horizons=3, num_features=2, exits=exits)
    with pytest.raises(ValueError, match=r"^EarlyExitHeads: num_layers must be at least 0, got -1\.$"):
        EarlyExitHeads(d_model=8, num_horizons=3, num_features=2, num_layers=-1)


def test_early_exits_need_the_layers_that_they_read() -> None:
    heads, hidden = make_heads("early_exit", 3), random_hidden(1, 2)
    sentence = r"^EarlyExitHeads: features must hold 2 inner layers' states, got none; pass the trunk's\."
    with pytest.raises(ValueError, match=sentence):
        heads(hidden)
    with pytest.raises(ValueError, match=sentence):
        heads.extend(hidden, heads.new_state(1, 5))


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
        match=r"^SequentialHeads: future holds the next tokens of 2 positions, but the modules attend to all of them; "
        r"pass it for all 5 positions, even if only some are trained\.$",
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
    states = heads(random_hidden(2, 5), future=future, **features(heads, 2, 5))
    assert [state.shape for state in states] == [(2, 5, WIDTH)] * num_horizons


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


@pytest.mark.parametrize("name", ["recurrent", "sequential", "conditioned"])
def test_heads_that_read_the_future_need_it(name: str) -> None:
    heads = make_heads(name, 2)
    sentence = rf"^{type(heads).__name__}: future is missing; pass the embeddings of the next tokens"
    with pytest.raises(ValueError, match=sentence):
        heads(random_hidden(1, 2))


@pytest.mark.parametrize("kind", [ChainedHeads, ParallelHeads, SequentialHeads])
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
