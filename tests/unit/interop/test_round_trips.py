"""What is exported has the names and shapes that its readers look for, and comes back bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtp_modules import MTPModel
from mtp_modules.interop import export_model, import_model
from mtp_modules.interop.exchange import FORMATS, OWN
from tests import interop
from tests.interop import DRAFT_TOKENS, D, F, L, V, all_logits, some_tokens

KV = 8  # two key-value heads of four channels

Shapes = dict[str, tuple[int, ...]]


def dense(prefix: str) -> Shapes:
    return {f"{prefix}gate_proj.weight": (F, D), f"{prefix}up_proj.weight": (F, D), f"{prefix}down_proj.weight": (D, F)}


def layer(prefix: str, *, queries: int = D, bias: bool = False, qk_norm: bool = False) -> Shapes:
    found: Shapes = {
        f"{prefix}input_layernorm.weight": (D,),
        f"{prefix}post_attention_layernorm.weight": (D,),
        f"{prefix}self_attn.q_proj.weight": (queries, D),
        f"{prefix}self_attn.k_proj.weight": (KV, D),
        f"{prefix}self_attn.v_proj.weight": (KV, D),
        f"{prefix}self_attn.o_proj.weight": (D, D),
    }
    if bias:
        found |= {f"{prefix}self_attn.{p}_proj.bias": (n,) for p, n in (("q", D), ("k", KV), ("v", KV))}
    if qk_norm:
        found |= {f"{prefix}self_attn.{p}_norm.weight": (4,) for p in "qk"}
    return found


def trunk(**options: bool | int) -> Shapes:
    found: Shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for index in range(L):
        prefix = f"model.layers.{index}."
        found |= layer(prefix, **options) | dense(f"{prefix}mlp.")  # type: ignore[arg-type]
    return found


def deepseek() -> Shapes:
    found = {name: shape for name, shape in glm().items() if ".k_proj" not in name and ".v_proj" not in name}
    for index in range(L + 2):
        prefix = f"model.layers.{index}.self_attn."
        found[f"{prefix}kv_a_proj_with_mqa.weight"] = (D + D // 4, D)
        found |= {f"{prefix}kv_a_layernorm.weight": (D,), f"{prefix}kv_b_proj.weight": (D, D)}
    return found


def glm() -> Shapes:
    found = trunk() | {"lm_head.weight": (V, D)}
    for name in dense(f"model.layers.{L - 1}.mlp."):
        del found[name]
    for index in (L - 1, L, L + 1):  # the trunk's last layer, and the modules
        prefix = f"model.layers.{index}."
        found |= layer(prefix) | dense(f"{prefix}mlp.shared_experts.")
        found |= {f"{prefix}mlp.gate.weight": (2, D), f"{prefix}mlp.gate.e_score_correction_bias": (2,)}
        for expert in range(2):
            experts = f"{prefix}mlp.experts.{expert}."
            found |= {f"{experts}{p}_proj.weight": (8, D) for p in ("gate", "up")}
            found[f"{experts}down_proj.weight"] = (D, 8)
    for index in (L, L + 1):
        prefix = f"model.layers.{index}."
        found |= {
            f"{prefix}enorm.weight": (D,),
            f"{prefix}hnorm.weight": (D,),
            f"{prefix}eh_proj.weight": (D, 2 * D),
            f"{prefix}shared_head.norm.weight": (D,),
            f"{prefix}shared_head.head.weight": (V, D),
            f"{prefix}embed_tokens.weight": (V, D),
        }
    return found


def qwen() -> Shapes:
    found = trunk(queries=2 * D, qk_norm=True) | layer("mtp.layers.0.", queries=2 * D, qk_norm=True)
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    found |= dense("mtp.layers.0.mlp.") | {f"mtp.{name}.weight": (D,) for name in norms}
    return found | {"mtp.fc.weight": (D, 2 * D)}


def mimo() -> Shapes:
    found = trunk(bias=True) | {"lm_head.weight": (V, D)}
    for index in range(2):
        prefix = f"model.mtp_layers.{index}."
        found |= layer(prefix, bias=True) | dense(f"{prefix}mlp.")
        found |= {f"{prefix}{n}_layernorm.weight": (D,) for n in ("token", "hidden", "final")}
        found[f"{prefix}input_proj.weight"] = (D, 2 * D)
    return found


def speculators() -> Shapes:
    prefix = "mtp_layers.0."
    found = layer(prefix, qk_norm=True) | dense(f"{prefix}mlp.") | {f"{prefix}input_proj.weight": (D, 2 * D)}
    return found | {f"{prefix}{n}_layernorm.weight": (D,) for n in ("token", "hidden", "final")}


def medusa() -> Shapes:
    found: Shapes = {}
    for head in range(3):
        found |= {f"{head}.0.linear.weight": (D, D), f"{head}.0.linear.bias": (D,), f"{head}.1.weight": (V, D)}
    return found


def medusa_vllm(num_layers: int, matrices: int) -> Shapes:
    found: Shapes = {f"lm_heads.{head}.weight": (V, D) for head in range(matrices)}
    for head in range(3):
        for index in range(num_layers):
            name = f"blocks.{head}.layers.{index}"
            found |= {f"{name}.weight": (D, D), f"{name}.bias": (D,)}
    return found


def founding_paper() -> Shapes:
    found: Shapes = {"tok_embeddings.weight": (V, D), "output.weight": (V, D), "norm.weight": (D,)}
    for prefix in ("layers.0.", "layers.1.", "layers.2.", "extra_heads.0.", "extra_heads.1."):
        found |= {f"{prefix}attention.w{p}.weight": (D, D) for p in "qo"}
        found |= {f"{prefix}attention.w{p}.weight": (KV, D) for p in "kv"}
        found |= {f"{prefix}feed_forward.w{p}.weight": (F, D) for p in "13"}
        found |= {f"{prefix}feed_forward.w2.weight": (D, F)}
        found |= {f"{prefix}{p}_norm.weight": (D,) for p in ("attention", "ffn")}
    return found


def outputs() -> Shapes:
    return {"lm_head.weight": (len(DRAFT_TOKENS), D), "d2t": (len(DRAFT_TOKENS),), "t2d": (V,)}


def eagle3(*norms: str, head_dim: int = 4) -> Shapes:
    prefix = "midlayer."
    found: Shapes = {"fc.weight": (D, 2 * D), "norm.weight": (D,)}
    found |= {f"{prefix}{n}.weight": (D,) for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    rows = (("q", 4), ("k", 2), ("v", 2))
    found |= {f"{prefix}self_attn.{p}_proj.weight": (n * head_dim, 2 * D) for p, n in rows}
    found |= {f"{prefix}self_attn.o_proj.weight": (D, 4 * head_dim)} | dense(f"{prefix}mlp.")
    return found | {f"{norm}.weight": (2 * D if norm == "input_norm" else D,) for norm in norms}


def dflash(num_layers: int = 2, *, own_mask: bool = True) -> Shapes:
    found: Shapes = {"fc.weight": (D, 2 * D), "hidden_norm.weight": (D,), "norm.weight": (D,)}
    for index in range(num_layers):
        found |= layer(f"layers.{index}.", qk_norm=True) | dense(f"layers.{index}.mlp.")
    return found | ({"embed_tokens.weight": (V + 1, D)} if own_mask else {})


def dspark(confidence: int | None, *, drafts: int = V) -> Shapes:
    found = dflash() | {"markov_head.markov_w1.weight": (V + 1, 3), "markov_head.markov_w2.weight": (drafts, 3)}
    if confidence is None:
        return found
    return found | {"confidence_head.proj.weight": (1, confidence), "confidence_head.proj.bias": (1,)}


Case = tuple[str, Callable[[], MTPModel], Callable[[], Shapes]]

CASES: dict[str, Case] = {
    "deepseek": ("deepseek", interop.deepseek, deepseek),
    "glm": ("glm", interop.glm, glm),
    "qwen": ("qwen", interop.qwen, qwen),
    "qwen, one module for many horizons": ("qwen", lambda: interop.qwen(4), qwen),
    "mimo": ("mimo", interop.mimo, mimo),
    "speculators": ("speculators", lambda: interop.qwen(4), speculators),
    "medusa": ("medusa", interop.medusa, medusa),
    "medusa_vllm": ("medusa_vllm", lambda: interop.medusa(2), lambda: medusa_vllm(2, 3)),
    "medusa_vllm, one output matrix": (
        "medusa_vllm",
        lambda: interop.medusa(own=False),
        lambda: medusa_vllm(1, 1),
    ),
    "eagle3": ("eagle3", interop.eagle3, eagle3),
    "eagle3, one norm": (
        "eagle3",
        lambda: interop.eagle3(norm_before_fc=True, norm_before_residual=True, rope_base=500.0, norm_eps=1e-5),
        lambda: eagle3("input_norm"),
    ),
    "eagle3.1, some tokens": (
        "eagle3",
        lambda: interop.eagle3(fc_norm=True, norm_output=True, head_dim=6, draft_tokens=True),
        lambda: eagle3("fc_norm.0", "fc_norm.1", head_dim=6) | outputs(),
    ),
    "eagle3, an output matrix": (
        "eagle3",
        lambda: interop.eagle3(2, own=True),
        lambda: eagle3() | {"lm_head.weight": (V, D)},
    ),
    "dflash": ("dflash", interop.dflash, dflash),
    "dflash, a token as mask": (
        "dflash",
        lambda: interop.dflash(mask_token=7, num_layers=3, norm_eps=1e-5, rope_base=500.0),
        lambda: dflash(3, own_mask=False),
    ),
    "dflash, causal, some tokens": (
        "dflash",
        lambda: interop.dflash(causal=True, draft_tokens=True),
        lambda: dflash() | outputs(),
    ),
    "dspark": ("dspark", interop.dspark, lambda: dspark(D + 3)),
    "dspark, confidence from the state, causal": (
        "dspark",
        lambda: interop.dspark("inside", sample_from_anchor=True, causal=True),
        lambda: dspark(D),
    ),
    "dspark, no confidence, some tokens": (
        "dspark",
        lambda: interop.dspark("", draft_tokens=True),
        lambda: dspark(None, drafts=len(DRAFT_TOKENS)) | outputs(),
    ),
    "founding_paper": ("founding_paper", interop.founding, founding_paper),
}
WEIGHTS = {"medusa": "medusa_lm_head.safetensors", "founding_paper": "consolidated.pth"}


def stored(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that lie in a folder."""
    path = folder / WEIGHTS.get(name, "model.safetensors")
    return torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)


def test_every_format_is_tried_here() -> None:
    assert {name for name, _, _ in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_readers(case: str, tmp_path: Path) -> None:
    name, make, shapes = CASES[case]
    export_model(make(), tmp_path / "out", format=name)
    assert {n: tuple(value.shape) for n, value in stored(name, tmp_path / "out").items()} == shapes()


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    name, make, _ = CASES[case]
    model = make()
    export_model(model, tmp_path / "out", format=name)
    base = None if FORMATS[name].keeps_trunk else model
    back = import_model(tmp_path / "out", format=name, trunk=base)
    tokens = some_tokens()
    for ours, theirs in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True):
        assert torch.equal(ours, theirs)
    export_model(back, tmp_path / "again", format=name)
    first, second = stored(name, tmp_path / "out"), stored(name, tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("case", CASES)
def test_how_heads_are_meant_stands_beside_them(case: str, tmp_path: Path) -> None:
    name, make, _ = CASES[case]
    export_model(make(), tmp_path, format=name)
    written = json.loads((tmp_path / "mtp_modules.json").read_text())
    assert written["format"] == name
    every = {"concatenation", "trunk_state", "chain_state", "position_0", "anchor", "block_attention"}
    assert set(written["conventions"]) == every
    for key, value in written["conventions"].items():
        assert value in FORMATS[name].takes.get(key, ("none",))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_without_any_one_tensor_or_with_one_more_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, make, _ = CASES[case]
    model = make()
    export_model(model, tmp_path, format=name)
    base = None if FORMATS[name].keeps_trunk else model
    whole, config = FORMATS[name].open(tmp_path)
    copies = ("embed_tokens.weight", "shared_head.head.weight")  # of layers behind the trunk, which may be left out
    for missing in whole:
        if name in ("deepseek", "glm") and missing.startswith("model.layers.") and missing.endswith(copies):
            continue
        if missing.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):  # an absent bias is 0, as ours is
            continue
        if missing == "t2d":  # d2t says as much
            continue
        part = {n: value for n, value in whole.items() if n != missing}
        monkeypatch.setattr(FORMATS[name], "open", lambda _, part=part: (part, config))
        with pytest.raises(ValueError, match=f"{missing} is missing".replace(".", r"\.")):
            import_model(tmp_path, format=name, trunk=base)
    monkeypatch.setattr(FORMATS[name], "open", lambda _: (whole | {"more.weight": torch.ones(1)}, config))
    with pytest.raises(ValueError, match=r": more\.weight is not part of this format;"):
        import_model(tmp_path, format=name, trunk=base)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chain_norm", [True, False])
def test_both_kinds_of_chains_and_outputs_come_back(tied: bool, chain_norm: bool, tmp_path: Path) -> None:
    model = interop.glm(tied=tied, chain_norm=chain_norm)
    export_model(model, tmp_path, format="glm")
    back = import_model(tmp_path, format="glm")
    assert back.unembedding.tied is tied
    tokens = some_tokens()
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def test_heads_alone_are_read_from_among_the_trunk_and_put_on_another(tmp_path: Path) -> None:
    model = interop.mimo()
    export_model(model, tmp_path, format="mimo")
    back = import_model(tmp_path, format="mimo", trunk=model)
    tokens = some_tokens()
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def test_heads_take_the_precision_of_the_model_that_they_are_put_on(tmp_path: Path) -> None:
    model = interop.medusa()
    export_model(model, tmp_path, format="medusa")
    back = import_model(tmp_path, format="medusa", trunk=model.to(torch.bfloat16))
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    tokens = some_tokens()
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def test_our_own_format_comes_back_too(tmp_path: Path) -> None:
    model = interop.glm()
    export_model(model, tmp_path / "out", format=OWN)
    back, tokens = import_model(tmp_path / "out", format=OWN), some_tokens()
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))
