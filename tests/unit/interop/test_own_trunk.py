"""A model of transformers says the same in our own trunk, and decodes the same."""

from typing import Any

import pytest
import torch

from mtp_modules import (
    FusedFeatureHeads,
    HuggingFaceTrunk,
    MTPModel,
    RecurrentHeads,
    SpeculativeDecoder,
    TransformerTrunk,
)
from mtp_modules.core.interfaces import Heads
from mtp_modules.interop import with_own_trunk
from tests.helpers import make_model

pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-3},
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_theta": 100.0},
    "qwen3": {"model_type": "qwen3", "head_dim": 6},
    "qwen3, heads as wide as the model": {"model_type": "qwen3", "head_dim": 16},
}


def model_of(kind: str, *, tied: bool, heads: Heads | None = None, max_positions: int = 40) -> MTPModel:
    torch.manual_seed(3)
    trunk = HuggingFaceTrunk(
        config=SIZES | KINDS[kind],
        feature_layers=(0,) if isinstance(heads, FusedFeatureHeads) else (),
        max_positions=max_positions,
    )
    heads = RecurrentHeads(d_model=16, num_horizons=4) if heads is None else heads
    model = MTPModel(trunk=trunk, heads=heads, tie_embeddings=tied).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_the_same_and_decodes_the_same(kind: str, tied: bool) -> None:
    model = model_of(kind, tied=tied)
    model.trim_drafts([3, 5, 7, 11, 13, 17, 19, 23])
    own = with_own_trunk(model)
    assert isinstance(own.trunk, TransformerTrunk)
    assert own.unembedding.tied == tied
    assert own.trunk.max_positions == 40
    tokens = torch.randint(30, (2, 20))
    for index, (one, other) in enumerate(zip(model(tokens), own(tokens), strict=True)):
        found = own.unembedding.logits(other, index)
        torch.testing.assert_close(found, model.unembedding.logits(one, index), atol=1e-4, rtol=1e-4)
    asked = {"max_new_tokens": 12, "seed": 1}
    first = SpeculativeDecoder().generate(model, [[1, 2, 3], [4]], **asked)
    assert SpeculativeDecoder().generate(own, [[1, 2, 3], [4]], **asked).tokens == first.tokens


def test_heads_that_read_inner_layers_still_do() -> None:
    model = model_of(
        "llama", tied=True, heads=FusedFeatureHeads(d_model=16, num_features=1, num_heads=2, num_horizons=3)
    )
    own = with_own_trunk(model)
    tokens = torch.randint(30, (2, 20))
    for one, other in zip(model(tokens), own(tokens), strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


def test_its_weights_are_its_own() -> None:
    model = model_of("llama", tied=True)
    own = with_own_trunk(model)
    before = own.trunk.layers[0].attention_norm.weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(own.trunk.layers[0].attention_norm.weight, before)
    assert own.heads is not model.heads


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
        r"model_type is gpt2, Tran",
    ),
    "biases": ({"model_type": "llama", "attention_bias": True}, r"self_attn\.\w+_proj\.bias"),
    "stretched positions": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        r"config\.json has rope_type=linear",
    ),
    "a window": ({"model_type": "mistral", "sliding_window": 8}, r"sliding_window"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_our_layers_are_not_is_refused(name: str) -> None:
    config, message = REFUSED[name]
    trunk = HuggingFaceTrunk(config=SIZES | config)
    model = MTPModel(trunk=trunk, heads=RecurrentHeads(d_model=16, num_horizons=2))
    with pytest.raises(ValueError, match=rf"^with_own_trunk: .*{message}"):
        with_own_trunk(model)


def test_any_other_trunk_stays_what_it_is() -> None:
    for kind in ("transformer", "gru"):
        model = make_model(kind, "linear", 2)
        assert with_own_trunk(model) is model


def test_a_window_no_smaller_than_the_model_is_no_window() -> None:
    with_own_trunk(
        MTPModel(
            trunk=HuggingFaceTrunk(config=SIZES | {"model_type": "mistral", "sliding_window": 8}, max_positions=8),
            heads=RecurrentHeads(d_model=16, num_horizons=2),
        )
    )
