"""The transformer trunk against its naive twin, and what it refuses."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mtp_modules import RecurrentTrunk, TransformerTrunk
from mtp_modules.layers import RMSNorm, RotaryPositions, TransformerLayer
from tests.helpers import assert_same, float64, make_trunk, random_tokens, randomise
from tests.reference import transformer as naive

SIZES = {"vocab_size": 11, "d_model": 8, "num_layers": 1, "num_heads": 2, "max_positions": 6}


@pytest.mark.parametrize("name", ["transformer", "transformer_grouped"])
def test_the_trunk_equals_the_naive_layers(name: str) -> None:
    trunk, tokens = make_trunk(name), random_tokens(2, 6)
    hidden, features = trunk(tokens)
    for b in range(2):
        x = trunk.embedding.weight[tokens[b]]
        for layer, feature in zip(trunk.layers, features, strict=True):
            x = naive.transformer_layer(layer, x)
            assert_same(feature[b], x)
        assert_same(hidden[b], naive.rms_norm(x, trunk.norm.weight))


def test_a_layer_that_normalises_queries_and_keys_equals_the_naive_one() -> None:
    with float64():
        trunk = TransformerTrunk(**{**SIZES, "num_heads": 4}, num_kv_heads=2, qk_norm=True, norm_eps=0.1)
    randomise(trunk)
    tokens = random_tokens(1, 5)
    x = naive.transformer_layer(trunk.layers[0], trunk.embedding(tokens)[0])
    assert_same(trunk(tokens).hidden[0], naive.rms_norm(x, trunk.norm.weight, 0.1))


def test_without_the_final_norm_the_residual_comes_out() -> None:
    with float64():
        trunk = TransformerTrunk(**SIZES, final_norm=False)
    randomise(trunk)
    tokens = random_tokens(1, 5)
    assert_same(trunk(tokens).hidden[0], naive.transformer_layer(trunk.layers[0], trunk.embedding(tokens)[0]))


def test_features_are_those_of_the_layers_that_were_named() -> None:
    trunk, some = make_trunk("transformer"), make_trunk("transformer")
    some.feature_layers = (1,)
    tokens = random_tokens(2, 6)
    assert len(some(tokens).features) == 1
    assert_same(some(tokens).features[0], trunk(tokens).features[1])
    assert TransformerTrunk(**SIZES)(tokens).features == ()


def test_rms_norm_equals_the_naive_one() -> None:
    with float64():
        norm = RMSNorm(8)
    randomise(norm)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_same(norm(x), naive.rms_norm(x, norm.weight))


@pytest.mark.parametrize("base", [100.0, 10000.0])
def test_rotation_equals_the_naive_one(base: float) -> None:
    with float64():
        rotary = RotaryPositions(6, 20, base=base)
    x, positions = torch.randn(1, 3, 2, 2, 6, dtype=torch.float64), torch.tensor([[0, 7, 19]])
    rotated = RotaryPositions.rotate(x, rotary(positions, 3, x))
    for index, position in enumerate(positions[0].tolist()):
        for head in range(2):
            for member in range(2):
                wanted = naive.rotate(x[0, index, head, member], position, base)
                assert_same(rotated[0, index, head, member], wanted)


@pytest.mark.parametrize(("num_kv_heads", "parts"), [(4, 4), (2, 2), (1, 1)])
def test_runs_of_whole_groups_of_rows_are_smaller_layers_that_add_up(num_kv_heads: int, parts: int) -> None:
    with float64():
        layer = TransformerLayer(16, num_heads=4, num_kv_heads=num_kv_heads, ffn_width=24)
    randomise(layer)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with float64():
        table = RotaryPositions(4, 5)(None, 5, x)
    mixed, fed = torch.zeros_like(x), torch.zeros_like(x)
    for part in range(parts):
        share = copy.deepcopy(layer)
        for fused, out in ((share.attention.qkv, share.attention.out), (share.ffn.gate_up, share.ffn.down)):
            fused.weight = nn.Parameter(fused.weight.chunk(parts)[part])
            out.weight = nn.Parameter(out.weight.chunk(parts, dim=1)[part])
        mixed += share.attention(x, table, None)
        fed += share.ffn(x)
    assert_same(mixed, layer.attention(x, table, None))
    assert_same(fed, layer.ffn(x))


def test_the_default_feed_forward_width_is_a_multiple_of_64() -> None:
    layer = TransformerLayer(96, num_heads=2)
    assert layer.ffn.down.in_features == 256


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        *(
            (
                lambda name=name: TransformerTrunk(**{**SIZES, name: 0}),
                f"TransformerTrunk: {name} must be at least 1, got 0.",
            )
            for name in SIZES
        ),
        (
            lambda: TransformerTrunk(**{**SIZES, "d_model": 9}),
            r"Attention: d_model \(9\) must be a multiple of num_heads \(2\).",
        ),
        (
            lambda: TransformerTrunk(**{**SIZES, "d_model": 6}),
            r"RotaryPositions: head_dim \(3\) must be a multiple of 2 \(2\).",
        ),
        (
            lambda: TransformerTrunk(**{**SIZES, "num_heads": 4}, num_kv_heads=3),
            r"Attention: num_heads \(4\) must be a multiple of num_kv_heads \(3\).",
        ),
        (
            lambda: TransformerTrunk(**SIZES, num_kv_heads=0),
            "TransformerLayer: num_kv_heads must be at least 1, got 0.",
        ),
        *(
            (
                lambda layers=layers: TransformerTrunk(**{**SIZES, "num_layers": 3}, feature_layers=layers),
                rf"TransformerTrunk: feature_layers must ascend within 0\.\.2, got {re.escape(str(layers))}\.",
            )
            for layers in ([3], [-1], [1, 0], [1, 1])
        ),
        (lambda: TransformerTrunk(**SIZES, ffn_width=0), "TransformerLayer: ffn_width must be at least 1, got 0."),
    ],
)
def test_sizes_that_are_refused(make: Callable, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make()


def test_a_sequence_may_not_be_longer_than_max_positions() -> None:
    trunk = TransformerTrunk(**SIZES)
    trunk(random_tokens(1, 6))
    sentence = "TransformerTrunk: a sequence of 7 tokens is longer than max_positions=6; shorten it or build the trunk"
    with pytest.raises(ValueError, match=f"^{sentence}"):
        trunk(random_tokens(1, 7))


def test_a_chunk_may_reach_beyond_the_last_position() -> None:
    trunk, tokens = TransformerTrunk(**SIZES).eval(), random_tokens(1, 9)
    state = trunk.new_state(1, 20)
    trunk(tokens[:, :4], state=state)
    state.commit([4])
    found = trunk(tokens[:, 4:], state=state).hidden
    state.commit([2])
    torch.testing.assert_close(found[:, :2], trunk(tokens[:, :6]).hidden[:, 4:])


def test_what_does_not_go_with_a_state() -> None:
    trunk, tokens = TransformerTrunk(**SIZES), random_tokens(1, 3)
    with pytest.raises(
        ValueError, match=r"^TransformerTrunk: document_ids cannot be combined with a state; decode one document"
    ):
        trunk(tokens, document_ids=tokens, state=trunk.new_state(1, 6))
    other = RecurrentTrunk(vocab_size=11, d_model=8).new_state(1, 6)
    with pytest.raises(
        ValueError, match=r"^TransformerTrunk: state must come from this trunk's new_state, got RecurrentState"
    ):
        trunk(tokens, state=other)


def test_a_narrow_norm_is_torch_s_fused_one() -> None:
    norm, x = RMSNorm(8, gain=1.001), torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.nn.functional.rms_norm(x, (8,), norm.weight.bfloat16(), norm.eps))
