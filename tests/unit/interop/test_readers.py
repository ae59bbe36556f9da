"""What other programs make of our files: those that run here read them, the rules of others are stated again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules import MTPModel, SpeculativeDecoder
from mtp_modules.interop import export_model, import_model
from tests import interop
from tests.interop import D, L, V, all_logits, some_tokens, stored
from tests.reference import llama

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
"""Float32, added up in another order, over logits of about 10."""


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_founding_papers_code_says_the_same_of_every_head(tmp_path: Path) -> None:
    model, tokens = interop.founding(), some_tokens(1)
    export_model(model, tmp_path, format="founding_paper")
    state, params = torch.load(tmp_path / "consolidated.pth", weights_only=True), read_json(tmp_path / "params.json")
    ours = all_logits(model, tokens)
    for own, theirs in zip(ours, llama.every_head(state, params, tokens[0, : ours[0].shape[1]]), strict=True):
        torch.testing.assert_close(own[0].double(), theirs, **CLOSE)


@pytest.mark.parametrize("ffn_width", [1, 24, 42, 43, 64, 1000])
def test_llamas_arithmetic_comes_to_our_feed_forward_width(ffn_width: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ffn_width": ffn_width}
    trunk = {"final_norm": False, **options}
    heads = interop.ParallelHeads(num_horizons=2, **{**interop.SIZES, **options})
    export_model(interop.make(heads, trunk=trunk, tie_embeddings=False), tmp_path, format="founding_paper")
    params = read_json(tmp_path / "params.json")
    hidden = int(2 * 4 * D / 3)
    hidden = int(params.get("ffn_dim_multiplier", 1.0) * hidden)
    assert params["multiple_of"] * -(-hidden // params["multiple_of"]) == ffn_width


class MedusaBlock(nn.Module):
    """FasterDecoding's: a linear layer with a bias, silu, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


def test_medusas_own_loader_takes_every_tensor_and_says_the_same(tmp_path: Path) -> None:
    model, tokens = interop.medusa(), some_tokens()
    export_model(model, tmp_path, format="medusa")
    config = read_json(tmp_path / "config.json")
    layers, count = config["medusa_num_layers"], config["medusa_num_heads"]
    # the original repeats one block, and loads without a look at names that do not fit
    heads = nn.ModuleList(nn.Sequential(*([MedusaBlock()] * layers), nn.Linear(D, V, bias=False)) for _ in range(count))
    found = heads.load_state_dict(stored(tmp_path / "medusa_lm_head.safetensors"), strict=False)
    assert found.missing_keys == found.unexpected_keys == []
    hidden = model.trunk(tokens[:, : -model.lookahead]).hidden
    for head, ours in zip(heads, all_logits(model, tokens)[1:], strict=True):
        torch.testing.assert_close(head(hidden), ours, **CLOSE)


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_medusas_own_files_are_read_with_and_without_a_prefix(prefix: str, tmp_path: Path) -> None:
    base, generator = interop.medusa(), torch.Generator().manual_seed(7)
    state = {}
    for head in range(2):
        block = torch.randn(D, D, generator=generator), torch.randn(D, generator=generator)
        for layer in range(2):  # one block, repeated, as the original saves it
            state |= {f"{prefix}{head}.{layer}.linear.weight": block[0].clone()}
            state |= {f"{prefix}{head}.{layer}.linear.bias": block[1].clone()}
        state[f"{prefix}{head}.2.weight"] = torch.randn(V, D, generator=generator)
    save_file(state, tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 2}))
    model, tokens = import_model(tmp_path, format="medusa", trunk=base), some_tokens()
    hidden = model.trunk(tokens[:, : -model.lookahead]).hidden
    for head, ours in enumerate(all_logits(model, tokens)[1:]):
        x, name = hidden, f"{prefix}{head}.0.linear"
        for _ in range(2):
            x = x + F.silu(x @ state[f"{name}.weight"].T + state[f"{name}.bias"])
        torch.testing.assert_close(x @ state[f"{prefix}{head}.2.weight"].T, ours, **CLOSE)


@pytest.mark.parametrize("own", [True, False])
def test_vllms_medusa_finds_every_parameter_and_says_the_same(own: bool, tmp_path: Path) -> None:
    model, tokens = interop.medusa(1 + own, own=own), some_tokens()
    export_model(model, tmp_path, format="medusa_vllm")
    config, state = read_json(tmp_path / "config.json"), stored(tmp_path / "model.safetensors")
    assert config["truncated_vocab_size"] == config["vocab_size"] == V
    hidden = model.trunk(tokens[:, : -model.lookahead]).hidden
    used = set()
    for head, ours in enumerate(all_logits(model, tokens)[1:]):
        x = hidden
        for layer in range(config["num_hidden_layers"]):
            name = f"blocks.{head}.layers.{layer}"
            assert config["medusa_fc_bias"]
            x = x + F.silu(x @ state[f"{name}.weight"].T + state[f"{name}.bias"])
            used |= {f"{name}.weight", f"{name}.bias"}
        matrix = "lm_heads.0.weight" if config["original_lm_head"] else f"lm_heads.{head}.weight"
        torch.testing.assert_close(x @ state[matrix].T, ours, **CLOSE)
        used.add(matrix)
    assert used == set(state)


def test_vllms_medusa_without_biases_is_read(tmp_path: Path) -> None:
    model = interop.medusa()
    for stack in model.heads.stacks:
        nn.init.zeros_(stack[0].linear.bias)
    export_model(model, tmp_path, format="medusa_vllm")
    state, config = stored(tmp_path / "model.safetensors"), read_json(tmp_path / "config.json")
    save_file({name: v for name, v in state.items() if not name.endswith("bias")}, tmp_path / "model.safetensors")
    del config["medusa_fc_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    back, tokens = import_model(tmp_path, format="medusa_vllm", trunk=model), some_tokens()
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def mtp_block(config: Any, layer_class: type[nn.Module], state: dict[str, Tensor], prefix: str) -> nn.Module:
    """Return a decoder layer of transformers with the tensors behind a prefix."""
    block = layer_class(config, 0)
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    block.load_state_dict({name: own[name] for name in block.state_dict()})
    return block.eval()


def test_qwen2_reads_the_trunk_of_mimo_and_its_layer_the_modules(tmp_path: Path) -> None:
    from transformers import Qwen2Config
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    model, tokens = interop.mimo(), some_tokens()
    export_model(model, tmp_path, format="mimo")
    config = Qwen2Config(**{k: v for k, v in read_json(tmp_path / "config.json").items() if k != "model_type"})
    config._attn_implementation = "eager"
    state = stored(tmp_path / "model.safetensors")
    theirs = qwen2.Qwen2ForCausalLM(config).eval()
    theirs.load_state_dict({name: v for name, v in state.items() if "mtp_layers" not in name})
    length = tokens.shape[1] - model.lookahead
    read = tokens[:, :length]
    ours = all_logits(model, tokens)
    with torch.no_grad():
        out = theirs.model(read).last_hidden_state
        torch.testing.assert_close(theirs.lm_head(out), ours[0], **CLOSE)
        positions = torch.arange(length)[None]
        table = theirs.model.rotary_emb(out, positions)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        for depth in range(2):
            prefix = f"model.mtp_layers.{depth}."
            embedded = theirs.model.embed_tokens(tokens[:, depth + 1 : depth + 1 + length])
            normed = [
                F.rms_norm(x, (D,), state[f"{prefix}{name}_layernorm.weight"], config.rms_norm_eps)
                for name, x in (("hidden", out), ("token", embedded))
            ]
            x = torch.cat(normed, dim=-1) @ state[f"{prefix}input_proj.weight"].T
            block = mtp_block(config, qwen2.Qwen2DecoderLayer, state, prefix)
            x = block(x, attention_mask=mask, position_ids=positions, position_embeddings=table)
            out = F.rms_norm(x, (D,), state[f"{prefix}final_layernorm.weight"], config.rms_norm_eps)
            torch.testing.assert_close(theirs.lm_head(out), ours[depth + 1], **CLOSE)


def test_qwen3_5_reads_the_trunk(tmp_path: Path) -> None:
    import transformers

    model, tokens = interop.qwen(), some_tokens()
    export_model(model, tmp_path, format="qwen")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(theirs).__name__ == "Qwen3_5ForCausalLM"
    with torch.no_grad():
        logits = theirs(tokens[:, : -model.lookahead]).logits
    torch.testing.assert_close(logits, all_logits(model, tokens)[0], **CLOSE)


# it knows where a model has its module by the depths of the released ones, and reads one
@pytest.mark.parametrize(("name", "make", "depth"), [("glm", interop.glm, 46), ("deepseek", interop.deepseek, 61)])
def test_transformers_decodes_with_our_module_what_we_decode(
    name: str, make: Callable[..., MTPModel], depth: int, tmp_path: Path
) -> None:
    import transformers
    from transformers.modeling_layers import MtpModel

    model, tokens = make(2, trunk={"num_layers": depth}), some_tokens()
    export_model(model, tmp_path, format=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    length = tokens.shape[1] - model.lookahead
    ours = all_logits(model, tokens)
    with torch.no_grad():
        out = theirs.model(tokens[:, :length]).last_hidden_state
        ahead = tokens[:, 1 : 1 + length]
        modules = MtpModel.from_pretrained(theirs).eval()
        drafted = modules.forward_layer(0, out, torch.arange(length)[None], None, input_ids=ahead)
        for own, state in zip(ours, (out, drafted), strict=True):
            torch.testing.assert_close(theirs.lm_head(state), own, atol=5e-3, rtol=5e-3)
    prompt = some_tokens(1, 9, seed=3)
    passes = [0]
    theirs.model.layers[0].register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    made = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, use_mtp=True, pad_token_id=0
    )
    generation = SpeculativeDecoder().generate(model, prompt.tolist(), max_new_tokens=24)
    assert made[0, 9:].tolist() == generation.tokens[0]
    assert passes[0] == generation.stats.forwards


def test_a_checkpoint_that_transformers_wrote_is_read(tmp_path: Path) -> None:
    import transformers
    from transformers.modeling_layers import MtpModel

    config = transformers.Glm4MoeConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=L, num_attention_heads=4, head_dim=4,
        num_key_value_heads=2, max_position_embeddings=40, first_k_dense_replace=L, n_routed_experts=2, n_group=1,
        topk_group=1, num_experts_per_tok=1, moe_intermediate_size=8, n_shared_experts=3, num_mtp_layers=1,
        use_qk_norm=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Glm4MoeForCausalLM(config).eval()
    modules = MtpModel(theirs, 1).eval()
    with torch.no_grad():
        for value in [*theirs.parameters(), *modules.parameters()]:
            value.copy_(torch.randn_like(value) * 0.3 + (value.ndim == 1))
        modules.layers[0].mtp_block.mlp.experts.down_proj.zero_()
    theirs.save_pretrained(tmp_path)
    (layer,) = modules.layers
    state, prefix = stored(tmp_path / "model.safetensors"), f"model.layers.{L}."
    for name, value in layer.state_dict().items():
        if "experts." in name and "shared" not in name:
            continue
        name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        state[f"{prefix}{name}"] = value.clone()
    for expert in range(2):
        experts, name = layer.mtp_block.mlp.experts, f"{prefix}mlp.experts.{expert}."
        gate, up = experts.gate_up_proj[expert].detach().chunk(2)
        state |= {f"{name}gate_proj.weight": gate.clone(), f"{name}up_proj.weight": up.clone()}
        state[f"{name}down_proj.weight"] = experts.down_proj[expert].detach().clone()
    save_file(state, tmp_path / "model.safetensors")
    saved = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(saved | {"num_nextn_predict_layers": 1}))
    model = import_model(tmp_path, format="glm", chain_state="after_norm", position_0="token")
    tokens = some_tokens()
    length = tokens.shape[1] - 2
    with torch.no_grad():
        out = theirs.model(tokens[:, :length]).last_hidden_state
        ahead = modules.forward_layer(0, out, torch.arange(length)[None], None, input_ids=tokens[:, 1 : 1 + length])
        wanted = [theirs.lm_head(out), theirs.lm_head(ahead)]
    for ours, other in zip(all_logits(model, tokens), wanted, strict=True):
        torch.testing.assert_close(ours, other, **CLOSE)
