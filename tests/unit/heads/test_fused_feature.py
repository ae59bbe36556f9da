"""Fused-feature heads against their equations, one position and one step at a time."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import FusedFeatureHeads, LinearHeads, MTPModel, MultiTokenLoss, TransformerTrunk
from mtp_modules.core.targets import document_runs
from mtp_modules.decoders import DynamicTree, SamplingParams, SpeculativeDecoder, StaticTree
from mtp_modules.heads.fused_module import SideBySideModule
from mtp_modules.heads.sequential_module import SequentialModule
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions
from tests.helpers import (
    TRUNKS,
    WIDTH,
    assert_same,
    covering,
    float64,
    gradients,
    log_probs_of,
    make_heads,
    make_model,
    random_tokens,
    randomise,
)
from tests.reference import transformer as naive

H = 4


def given(rows: int, length: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    hidden, future = torch.randn(rows, length, WIDTH).double(), torch.randn(rows, length, H - 1, WIDTH).double()
    return hidden, future, (torch.randn(rows, length, WIDTH).double(), torch.randn(rows, length, WIDTH).double())


def stepped(step: SequentialModule | SideBySideModule, states: list[Tensor], tokens: list[Tensor]) -> Tensor:
    """Return the layer's last output for a sequence of states and tokens."""
    pairs = [
        (naive.rms_norm(token, step.token_norm.weight), naive.rms_norm(state, step.state_norm.weight))
        for state, token in zip(states, tokens, strict=True)
    ]
    if isinstance(step, SequentialModule):
        inputs = torch.stack([torch.cat(pair, dim=-1) @ step.merge.weight.T for pair in pairs])
        return naive.transformer_layer(step.layer, inputs)[-1]
    attention, inputs = step.layer.attention, torch.stack([torch.cat(pair, dim=-1) for pair in pairs])
    table = RotaryPositions(attention.head_dim, len(inputs))(None, len(inputs), inputs)
    queries, keys, values = attention.project(inputs[None], table)
    parts = []
    for head in range(attention.num_heads):
        group, member = divmod(head, attention.groups)
        weights = (keys[0, group] @ queries[0, group, member, -1] / attention.head_dim**0.5).softmax(dim=0)
        parts.append(weights @ values[0, group])
    residual = pairs[-1][1] if step.norm_before_residual else states[-1]
    x = residual + attention.out.weight @ torch.cat(parts)
    return x + step.layer.ffn(naive.rms_norm(x, step.layer.ffn_norm.weight))


def fused_by_hand(heads: FusedFeatureHeads, features: list[Tensor]) -> Tensor:
    norms = [norm.weight for norm in heads.feature_norms]
    if len(norms) == len(features):
        features = [naive.rms_norm(part, weight) for part, weight in zip(features, norms, strict=True)]
    joined = torch.cat(features, dim=-1)
    return (naive.rms_norm(joined, norms[0]) if len(norms) == 1 else joined) @ heads.fuse.weight.T


def walked(heads: FusedFeatureHeads, future: Tensor, features: list[Tensor], first: int, t: int) -> list[Tensor]:
    """Return the states of the horizons beyond the first at position ``t`` of a text that begins at ``first``.

    As the drafter would find them: the sequence of what is known up to ``t``, and then its own outputs.
    """
    inputs, tokens = list(fused_by_hand(heads, features)[first : t + 1]), list(future[first : t + 1, 0])
    states: list[Tensor] = []
    for index in range(H - 1):
        said = stepped(heads.drafter.steps[0], inputs, tokens)
        states.append(naive.rms_norm(said, heads.drafter.norms[0].weight))
        inputs.append(states[-1] if heads.drafter.chain_norm else said)
        if index < H - 2:
            tokens.append(future[t, index + 1])
    return states


RELEASED: dict[str, dict[str, bool | int]] = {
    "merged": {},
    "released": {"merge": False, "head_dim": 6},
    "speculators": {"merge": False, "norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    "3.1": {"merge": False, "fc_norm": True, "norm_output": True},
}


@pytest.mark.parametrize(("documents", "some", "options"), covering([False, True], [False, True], RELEASED))
def test_training_takes_the_steps_of_drafting(documents: bool, some: bool, options: str) -> None:
    with float64():
        sizes = {"d_model": WIDTH, "num_horizons": H, "num_heads": 4, "num_features": 2, "num_kv_heads": 2}
        heads = FusedFeatureHeads(**sizes, ffn_width=12, **RELEASED[options])
    randomise(heads)
    hidden, future, features = given(2, 5)
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]]) if documents else None
    positions = torch.tensor([[1, 4], [0, 3]]) if some else None
    states = heads(hidden, future=future, features=features, document_ids=ids, positions=positions)
    assert states[0] is hidden
    runs = torch.zeros(2, 5) if ids is None else document_runs(ids)
    for b in range(2):
        for place, t in enumerate(range(5) if positions is None else positions[b].tolist()):
            first = int((runs[b] == runs[b, t]).int().argmax())
            wanted = walked(heads, future[b], [feature[b] for feature in features], first, t)
            for state, expected in zip(states[1:], wanted, strict=True):
                assert_same(state[b, place], expected)


@pytest.mark.parametrize("heads", ["fused", "eagle"])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_parameter_learns(trunk: str, heads: str) -> None:
    found = gradients(model := make_model(trunk, heads, 3), MultiTokenLoss()(model, random_tokens(2, 8)).loss)
    assert [name for name, gradient in found.items() if not gradient.abs().sum() > 0] == []


def test_detached_from_the_trunk_it_gives_features_no_gradient() -> None:
    model, tokens = make_model("transformer", "fused", 3), random_tokens(2, 8)
    both, near = (
        gradients(model, MultiTokenLoss(detach=["trunk", "embedding", "unembedding"])(model, tokens, weights=w).loss)
        for w in ([1.0, 0.5, 0.5], [1.0, 0.0, 0.0])
    )
    for name, gradient in both.items():
        if not name.startswith("heads."):
            assert_same(gradient, near[name])


def test_drafts_beyond_the_horizons_go_on_with_its_own_outputs() -> None:
    """Heads for more horizons, with the same weights, say in training what these draft."""
    few, many = (make_model("transformer", "fused", horizons).eval() for horizons in (2, 5))
    text, last = [1, 2, 3, 4], 6
    states = few.trunk.new_state(1, 9), few.heads.new_state(1, 9)
    output = few.trunk(torch.tensor([text]), state=states[0])
    few.heads.extend(
        output.hidden, states[1], tokens=torch.tensor([text]), embed=few.trunk.embedding, features=output.features
    )
    for state in states:
        state.commit([4])
    assert few.heads.max_drafts is None
    draft = few.heads.draft(
        torch.tensor([last]), states[1], num_drafts=4, embed=few.trunk.embedding, unembed=few.unembedding.logits
    )
    all_probs = log_probs_of(many, torch.tensor([[*text, last, *draft.tokens[0].tolist()]]))
    for depth in range(4):
        assert_same(draft.logits[0, depth].log_softmax(dim=0), all_probs[depth + 1][0, 3])


@pytest.mark.parametrize("tree", [StaticTree(widths=[2, 2, 1]), DynamicTree(depth=4, width=2, nodes=7)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_give_what_chains_give(tree: StaticTree | DynamicTree, temperature: float) -> None:
    model, params = make_model("transformer_grouped", "fused", 3).eval(), SamplingParams(temperature=temperature)
    options = {"max_new_tokens": 12, "sampling": params, "seed": 3}
    found = SpeculativeDecoder(tree=tree).generate(model, [[1, 2, 3], [4]], **options)
    assert found.tokens == SpeculativeDecoder().generate(model, [[1, 2, 3], [4]], **options).tokens


@pytest.mark.parametrize("kind", ["fused", "eagle"])
@pytest.mark.parametrize("num_far", [0, 2, 6])
def test_the_formula_of_operations_is_what_runs(num_far: int, kind: str) -> None:
    heads, (hidden, future, features) = make_heads(kind, H), given(2, 6)
    positions = torch.arange(num_far).expand(2, -1) if num_far < 6 else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if num_far:
            heads(hidden, future=future, features=features, positions=positions)
        else:
            heads.first(hidden)
    qkv = heads.drafter.steps[0].layer.attention.qkv
    # With positions, queries are projected everywhere and then once more, and keys and values twice.
    wasted = 2 * qkv.in_features * (WIDTH * 6 + (qkv.out_features - WIDTH) * num_far) if 0 < num_far < 6 else 0
    assert counter.get_total_flops() == 2 * (heads.flops(6, num_far) + wasted)


@pytest.mark.parametrize("name", ["d_model", "num_horizons", "num_heads", "num_features", "max_positions"])
def test_sizes_must_be_at_least_one(name: str) -> None:
    sizes = {"d_model": 8, "num_horizons": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=rf"^FusedFeatureHeads: {name} must be at least 1, got 0\.$"):
        FusedFeatureHeads(**{**sizes, name: 0})


@pytest.mark.parametrize("options", RELEASED)
def test_every_norm_has_the_given_eps(options: str) -> None:
    sizes = {"d_model": 8, "num_horizons": 3, "num_heads": 2}
    heads = FusedFeatureHeads(**sizes, norm_eps=1e-3, **RELEASED[options])
    assert {part.eps for part in heads.modules() if isinstance(part, RMSNorm)} == {1e-3}


def test_norms_that_exclude_one_another_are_refused() -> None:
    sizes = {"d_model": 8, "num_horizons": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=r"^FusedFeatureHeads: norm_before_fc and fc_norm both normalise the fea"):
        FusedFeatureHeads(**sizes, norm_before_fc=True, fc_norm=True)
    with pytest.raises(ValueError, match=r"^FusedFeatureHeads: norm_before_residual needs a layer that adds to"):
        FusedFeatureHeads(**sizes, norm_before_residual=True)
    with pytest.raises(ValueError, match=r"^FusedFeatureHeads: head_dim=8 needs a layer that attends over both side"):
        FusedFeatureHeads(**sizes, head_dim=8)


def test_what_is_missing_is_named() -> None:
    heads, (hidden, future, features) = make_heads("fused", H), given(1, 5)
    with pytest.raises(ValueError, match=r"^FusedFeatureHeads: features must hold 2 inner layers' states, got none; "):
        heads(hidden, future=future)
    with pytest.raises(ValueError, match=r"^FusedFeatureHeads: features must hold 2 inner layers' states, got 1; "):
        heads(hidden, future=future, features=features[:1])
    sentence = r"^FusedFeatureHeads: future must hold the next tokens of all 5 positions, got {}; MTPModel passes it\.$"
    for wrong, got in ((None, "none"), (future[:, :2], "those of 2")):
        with pytest.raises(ValueError, match=sentence.format(got)):
            heads(hidden, future=wrong, features=features)
    with pytest.raises(
        ValueError, match=r"^FusedFeatureHeads: a sequence of 49 tokens is longer than max_positions=48"
    ):
        heads(*given(1, 49)[:1])


def test_a_trunk_without_these_features_is_refused() -> None:
    trunk = TransformerTrunk(vocab_size=9, d_model=8, num_layers=3, num_heads=2, feature_layers=[0, 2])
    with pytest.raises(
        ValueError, match=r"^MTPModel: FusedFeatureHeads reads 3 inner layers, but TransformerTrunk has"
    ):
        MTPModel(trunk=trunk, heads=FusedFeatureHeads(d_model=8, num_horizons=2, num_heads=2))
    MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2))


def test_features_matter_layer_by_layer() -> None:
    heads, (hidden, future, features) = make_heads("fused", H), given(1, 5)
    states = heads(hidden, future=future, features=features)
    for changed, t in itertools.product(range(2), range(5)):
        other = [feature.clone() for feature in features]
        other[changed][0, t] += 1.0
        moved = heads(hidden, future=future, features=tuple(other))
        for was, now in zip(states[1:], moved[1:], strict=True):
            assert [not torch.allclose(was[0, s], now[0, s]) for s in range(5)] == [s >= t for s in range(5)]


def test_one_horizon_needs_no_features() -> None:
    with float64():
        heads = FusedFeatureHeads(d_model=WIDTH, num_horizons=1, num_heads=2)
    randomise(heads)
    hidden = torch.randn(1, 3, WIDTH).double()
    assert heads(hidden)[0] is hidden
    assert list(heads.parameters()) == []
    assert (heads.max_drafts, heads.flops(3, 3)) == (0, 0)
