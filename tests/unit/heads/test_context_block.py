"""Blocks with the context in their keys and values, against a naive drafter."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import ContextBlockHeads, MTPModel, MultiTokenLoss, SpeculativeDecoder, TransformerTrunk
from mtp_modules.core.targets import document_runs
from mtp_modules.decoders import SamplingParams, StaticTree
from tests.helpers import (
    TRUNKS,
    WIDTH,
    assert_same,
    float64,
    gradients,
    make_heads,
    make_model,
    random_tokens,
    randomise,
)
from tests.reference import transformer as naive

H = 4


def given(rows: int, length: int, width: int = WIDTH) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    hidden, future = torch.randn(rows, length, WIDTH).double(), torch.randn(rows, length, H - 1, width).double()
    return hidden, future, (torch.randn(rows, length, WIDTH).double(), torch.randn(rows, length, WIDTH).double())


def denoised(heads: ContextBlockHeads, token: Tensor, features: list[Tensor], first: int, t: int) -> Tensor:
    """Return the states of the horizons beyond the first at position ``t`` of a text that begins at ``first``."""
    fused = torch.cat(features, dim=-1)[first : t + 1] @ heads.fuse.weight.T
    context = naive.rms_norm(fused, heads.context_norm.weight)
    token = token if heads.from_token is None else heads.from_token.weight @ token
    slots = H - 1 if heads.sample_from_anchor else H
    x = torch.stack([token, *[heads.mask] * (slots - 1)])
    places = torch.arange(first, t + 1 + slots)[None]
    table = heads.rotary(places, places.shape[1], x)
    for own in heads.layers:
        layer, attention = own.layer, own.layer.attention
        normed = naive.rms_norm(x, layer.attention_norm.weight)
        queries, keys, values = attention.project(torch.cat((context, normed))[None], table)
        out = torch.zeros(slots, attention.num_heads * attention.head_dim).double()
        for slot, head in itertools.product(range(slots), range(attention.num_heads)):
            group, member = divmod(head, attention.groups)
            query = queries[0, group, member, len(context) + slot]
            seen = len(context) + (slot + 1 if heads.causal else slots)
            weights = (keys[0, group, :seen] @ query / attention.head_dim**0.5).softmax(dim=0)
            start = head * attention.head_dim
            out[slot, start : start + attention.head_dim] = weights @ values[0, group, :seen]
        x = x + out @ attention.out.weight.T
        x = x + layer.ffn(naive.rms_norm(x, layer.ffn_norm.weight))
    return naive.rms_norm(x if heads.sample_from_anchor else x[1:], heads.norm.weight)


KINDS: dict[str, dict[str, bool | int]] = {
    "both ways": {},
    "causal": {"causal": True},
    "from the anchor": {"sample_from_anchor": True, "head_dim": 6},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("documents", "some", "width"), [(False, False, WIDTH), (True, True, WIDTH), (True, False, 5)])
def test_a_block_sees_itself_and_the_context_up_to_its_position(
    documents: bool, some: bool, width: int, kind: str
) -> None:
    with float64():
        heads = ContextBlockHeads(
            d_model=WIDTH,
            num_horizons=H,
            num_heads=4,
            num_features=2,
            num_kv_heads=2,
            ffn_width=12,
            embedding_width=width,
            **KINDS[kind],
        )
    randomise(heads)
    hidden, future, features = given(2, 5, width)
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]]) if documents else None
    positions = torch.tensor([[1, 4], [0, 3]]) if some else None
    read = future if positions is None else future[torch.arange(2)[:, None], positions]
    states = heads(hidden, future=read, features=features, document_ids=ids, positions=positions)
    assert states[0] is hidden
    runs = torch.zeros(2, 5) if ids is None else document_runs(ids)
    for b in range(2):
        for place, t in enumerate(range(5) if positions is None else positions[b].tolist()):
            first = int((runs[b] == runs[b, t]).int().argmax())
            wanted = denoised(heads, future[b, t, 0], [feature[b] for feature in features], first, t)
            for state, expected in zip(states[1:], wanted, strict=True):
                assert_same(state[b, place], expected)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_parameter_learns(trunk: str) -> None:
    model, loss = make_model(trunk, "context_block", 3), MultiTokenLoss(share_of_positions=0.5)
    found = gradients(model, loss(model, random_tokens(2, 9)).loss)
    assert [name for name, gradient in found.items() if not gradient.abs().sum() > 0] == []


def test_detached_from_the_trunk_it_gives_features_no_gradient() -> None:
    model, tokens = make_model("transformer", "context_block", 3), random_tokens(2, 8)
    both, near = (
        gradients(model, MultiTokenLoss(detach=["trunk", "embedding", "unembedding"])(model, tokens, weights=w).loss)
        for w in ([1.0, 0.5, 0.5], [1.0, 0.0, 0.0])
    )
    for name, gradient in both.items():
        if not name.startswith("heads."):
            assert_same(gradient, near[name])


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_has_the_states_of_training(kind: str) -> None:
    with float64():
        heads = ContextBlockHeads(d_model=WIDTH, num_horizons=H, num_heads=4, num_features=2, **KINDS[kind])
    randomise(heads)
    hidden, future, features = given(2, 6)
    trained = heads(hidden, future=future, features=features)
    state, token = heads.new_state(2, 6), torch.zeros(2, 1, dtype=torch.long)
    state.begin(6)
    heads.read(hidden, state, features=features)
    state.commit([6, 6])
    for depth in range(H - 1):
        found = heads.draft_states(
            token, state, depth=depth, before=None, parents=token, embed=lambda _: future[:, -1:, 0]
        )
        assert_same(found[:, 0], trained[depth + 1][:, -1])


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_fewer_drafts_are_the_first_of_the_block(num_drafts: int) -> None:
    model = make_model("transformer_grouped", "context_block", H).eval()
    prompts, options = [[1, 2, 3], [4]], {"max_new_tokens": 12, "sampling": SamplingParams(temperature=1.0), "seed": 2}
    few, whole = (SpeculativeDecoder(num_drafts=n, return_distributions=True) for n in (num_drafts, H - 1))
    one, other = (next(r for r in d.stream(model, prompts, **options) if max(r.drafted)) for d in (few, whole))
    assert_same(one.distributions.draft_probs, other.distributions.draft_probs[:, :num_drafts])
    assert few.generate(model, prompts, **options).tokens == whole.generate(model, prompts, **options).tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_give_what_chains_give(temperature: float) -> None:
    model, params = (
        make_model("transformer_grouped", "context_block", H).eval(),
        SamplingParams(temperature=temperature),
    )
    options = {"max_new_tokens": 12, "sampling": params, "seed": 3}
    found = SpeculativeDecoder(tree=StaticTree(widths=[2, 2, 1])).generate(model, [[1, 2, 3], [4]], **options)
    assert found.tokens == SpeculativeDecoder().generate(model, [[1, 2, 3], [4]], **options).tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_far", [0, 2, 6])
def test_the_formula_of_operations_is_what_runs(num_far: int, kind: str) -> None:
    with float64():
        heads = ContextBlockHeads(d_model=WIDTH, num_horizons=H, num_heads=4, num_features=2, **KINDS[kind])
    hidden, future, features = given(2, 6)
    positions = torch.arange(num_far).expand(2, -1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if num_far:
            heads(hidden, future=future[:, :num_far], features=features, positions=positions)
        else:
            heads.first(hidden)
    # Queries of the context are projected along with its keys and values.
    assert counter.get_total_flops() == 2 * heads.flops(6, num_far)


@pytest.mark.parametrize(
    "name", ["d_model", "num_horizons", "num_heads", "num_features", "num_layers", "max_positions", "embedding_width"]
)
def test_sizes_must_be_at_least_one(name: str) -> None:
    sizes = {"d_model": 8, "num_horizons": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=rf"^ContextBlockHeads: {name} must be at least 1, got 0\.$"):
        ContextBlockHeads(**{**sizes, name: 0})


def test_what_is_missing_is_named() -> None:
    heads, (hidden, future, features) = make_heads("context_block", H), given(1, 5)
    with pytest.raises(ValueError, match=r"^ContextBlockHeads: features must hold 2 inner layers' states, got none; "):
        heads(hidden, future=future)
    with pytest.raises(ValueError, match=r"^ContextBlockHeads: features must hold 2 inner layers' states, got 1; "):
        heads(hidden, future=future, features=features[:1])
    with pytest.raises(ValueError, match=r"^ContextBlockHeads: future is missing; pass the embeddings"):
        heads(hidden, features=features)
    with pytest.raises(ValueError, match=r"^ContextBlockHeads: a sequence of 49 tokens is longer than max_positions"):
        heads(*given(1, 49)[:1])
    plain, token = heads.new_state(1, 5, for_drafts=False), torch.zeros(1, 1, dtype=torch.long)
    more = {"depth": 0, "before": None, "parents": token, "embed": lambda ids: torch.zeros(*ids.shape, WIDTH).double()}
    with pytest.raises(ValueError, match=r"^ContextBlockHeads: the state was made with for_drafts=False; make one"):
        heads.draft_states(token, plain, **more)
    with pytest.raises(ValueError, match=r"^ContextBlockHeads: state must come from these heads' new_state, got"):
        heads.draft_states(token, make_model("gru").trunk.new_state(1, 5), **more)


def test_a_trunk_without_these_features_is_refused() -> None:
    trunk = TransformerTrunk(vocab_size=9, d_model=8, num_layers=3, num_heads=2, feature_layers=[0, 2])
    with pytest.raises(
        ValueError, match=r"^MTPModel: ContextBlockHeads reads 3 inner layers, but TransformerTrunk has"
    ):
        MTPModel(trunk=trunk, heads=ContextBlockHeads(d_model=8, num_horizons=2, num_heads=2))


def test_one_horizon_needs_no_features() -> None:
    heads, hidden = ContextBlockHeads(d_model=WIDTH, num_horizons=1, num_heads=2), torch.randn(1, 3, WIDTH)
    assert heads(hidden)[0] is hidden
    assert list(heads.parameters()) == []
    assert (heads.max_drafts, heads.flops(3, 3)) == (0, 0)
