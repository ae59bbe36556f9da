"""Models of transformers in memory and by one line, what is rejected and what to do instead, and what is saved."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from torch import nn

from mtp_modules import (
    AutoregressiveDecoder,
    HuggingFaceTrunk,
    MTPModel,
    MultiTokenLoss,
    RecurrentHeads,
    ResidualHeads,
    SpeculativeDecoder,
    describe,
)
from tests.architecture.imports import ROOT
from tests.helpers import VOCAB, WIDTH, assert_same, float64, random_tokens, randomise
from tests.huggingface import CONFIGS, save_model

TINY = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
TINY |= {"eos_token_id": 2}
ATTENTION = {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 48}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba2": TINY | {"num_heads": 4, "head_dim": 4, "state_size": 4, "n_groups": 1, "chunk_size": 4, "expand": 2},
    "bamba": TINY | ATTENTION | MAMBA | {"mamba_expand": 2, "attn_layer_indices": [1]},
    "falcon_h1": TINY | ATTENTION | MAMBA | {"head_dim": 4, "mamba_d_ssm": 16},
    "granitemoehybrid": TINY
    | ATTENTION
    | MAMBA
    | {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 8,
        "layer_types": ["mamba", "attention"],
    },
    "nemotron_h": TINY
    | ATTENTION
    | {"mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 4, "head_dim": 4}
    | {"layers_block_type": ["mamba", "attention"]},
}
"""Those with infinity in their configuration."""
SMALL_GEMMA = TINY | ATTENTION | {"head_dim": 4}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong types reach the checks of the functions themselves."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def made(model_type: str, **sizes: Any) -> Any:
    """Build a model of transformers, every parameter large enough to matter."""
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    return model


def logits_of(model: MTPModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.unembedding.logits(model(torch.cat((tokens, tokens[:, : model.lookahead]), dim=1))[0])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi", "gpt2", "granite", "mamba", "mixtral"])
def test_a_model_in_memory_and_by_its_folder_keep_their_logits(name: str, tmp_path: Path) -> None:
    own, tokens = save_model(name, tmp_path), random_tokens(2, 9)
    make = partial(MTPModel.from_hugging_face, heads=ResidualHeads, num_horizons=3)
    with torch.no_grad():
        wanted = own(tokens).logits
        by_folder = make(tmp_path)
        in_memory = make(own)
        for model in (by_folder, in_memory):
            assert not model.training
            assert_same(logits_of(model, tokens), wanted, 1e-5)
        assert_same(own(tokens).logits, wanted, 1e-5)  # the model itself goes on working
    tied = own.get_output_embeddings().weight is own.get_input_embeddings().weight
    assert (in_memory.unembedding.weight is own.get_input_embeddings().weight) == tied
    assert in_memory.unembedding.weight.data_ptr() == own.get_output_embeddings().weight.data_ptr()
    assert describe(in_memory) == describe(by_folder)
    in_memory.save_pretrained(tmp_path / "ours")
    again, _ = MTPModel.from_pretrained(tmp_path / "ours")
    assert_same(logits_of(again, tokens), wanted, 1e-5)


def test_a_model_in_memory_is_trained_and_drafts_for_itself() -> None:
    own = made("llama", **TINY, **ATTENTION)
    own.train()
    trunk = HuggingFaceTrunk(own)
    assert trunk.training
    model = MTPModel(trunk=trunk, heads=RecurrentHeads(d_model=WIDTH, num_horizons=3), tie_embeddings=False)
    weight, tokens = own.model.layers[0].mlp.up_proj.weight, random_tokens(2, 9)
    before = weight.detach().clone()
    MultiTokenLoss()(model, tokens).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(weight, before)  # one weight, in both
    model.eval()
    wanted = own.eval().generate(tokens[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    assert SpeculativeDecoder().generate(model, tokens[:1], max_new_tokens=8).tokens == [wanted]


def test_heads_are_made_for_the_trunk(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    model = MTPModel.from_hugging_face(
        str(tmp_path), heads=partial(RecurrentHeads, width=5), num_horizons=2, dtype="bfloat16", max_positions=20
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.horizons, model.trunk.max_positions) == ((1, 2), 20)
    built = ResidualHeads(d_model=WIDTH, num_horizons=4)
    assert MTPModel.from_hugging_face(tmp_path, heads=built).heads is built


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"heads": ResidualHeads},
            r"heads=ResidualHeads cannot be called with d_model alone \(.*num_horizons'\); give",
        ),
        (
            {"heads": ResidualHeads(d_model=WIDTH, num_horizons=2), "num_horizons": 3},
            r"num_horizons is 3, but the heads are built already; leave it out\.",
        ),
        ({"heads": lambda d_model: nn.Linear(d_model, 2)}, r"heads must make Heads, got Linear; give a class such as"),
    ],
)
def test_heads_that_cannot_be_made(arguments: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    with pytest.raises(ValueError, match=f"^MTPModel: {sentence}"):
        MTPModel.from_hugging_face(tmp_path, **arguments)


def test_one_line_decodes_without_lightning(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path)
    code = (
        "import sys; from mtp_modules import MTPModel, ResidualHeads, SpeculativeDecoder\n"
        "assert 'transformers' not in sys.modules\n"
        f"model = MTPModel.from_hugging_face({str(tmp_path)!r}, heads=ResidualHeads, num_horizons=3)\n"
        "print(len(SpeculativeDecoder().generate(model, [[3, 4]], max_new_tokens=5).tokens[0]))\n"
        "assert 'lightning' not in sys.modules and 'torchmetrics' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model_of_transformers(tmp_path: Path) -> None:
    own = made("llama", **TINY, **ATTENTION)
    with pytest.raises(ValueError, match=r"^HuggingFaceTrunk: model is given, and dtype too; give one of them\.$"):
        HuggingFaceTrunk(own, dtype="float32")
    sentence = r"^HuggingFaceTrunk: model must be a causal language model of transformers, got Linear; wrap it yourself"
    with pytest.raises(ValueError, match=sentence):
        HuggingFaceTrunk(nn.Linear(2, 2))
    adapted = nn.Module()
    adapted.merge_and_unload = lambda: own
    with pytest.raises(ValueError, match=r"got Module; merge its adapters first \(merge_and_unload\)"):
        HuggingFaceTrunk(adapted)
    with pytest.raises(
        ValueError, match=r"^HuggingFaceTrunk: LlamaModel has no embedding, layers and output matrix apart"
    ):
        HuggingFaceTrunk(own.model)


def test_a_weight_that_is_not_finite_is_named() -> None:
    own = made("llama", **TINY, **ATTENTION)
    with torch.no_grad():
        own.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    sentence = (
        r"^HuggingFaceTrunk: the weight model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM is not finite; get"
    )
    with pytest.raises(ValueError, match=sentence):
        HuggingFaceTrunk(own)


@pytest.mark.parametrize(
    ("model_type", "switch", "sizes"),
    [
        ("xlm", "causal", {"vocab_size": VOCAB, "emb_dim": WIDTH, "n_layers": 2, "n_heads": 2}),
        ("bert-generation", "is_decoder", {**TINY, "intermediate_size": 12, "num_attention_heads": 2}),
    ],
)
def test_a_model_that_is_not_causal_is_rejected_until_it_is(
    model_type: str, switch: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    both = made(model_type, **sizes)
    sentence = (
        rf"is not causal: .*; if it was trained so, let from_pretrained load it with {switch}=True, or give its name"
    )
    with pytest.raises(ValueError, match=sentence):
        HuggingFaceTrunk(both)
    both.save_pretrained(tmp_path)
    model = MTPModel.from_hugging_face(tmp_path, config={switch: True}, heads=ResidualHeads, num_horizons=2)
    tokens = random_tokens(1, 6).clamp(min=5)
    other = torch.cat((tokens[:, :-1], tokens[:, :1]), dim=1)
    with torch.no_grad():
        assert torch.equal(model.trunk(other).hidden[:, :-1], model.trunk(tokens).hidden[:, :-1])


@pytest.mark.parametrize(
    ("model_type", "sizes", "sentence"),
    [
        (
            "bart",
            {"vocab_size": VOCAB, "d_model": WIDTH, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 8}
            | {"decoder_attention_heads": 2, "max_position_embeddings": 48},
            r"BartForCausalLM has no embedding, layers and output matrix apart, .*; wrap it by RecomputedTrunk",
        ),
        (
            "trocr",
            {"vocab_size": VOCAB, "d_model": WIDTH, "decoder_layers": 1, "decoder_ffn_dim": 8}
            | {"decoder_attention_heads": 2, "max_position_embeddings": 48},
            r"TrOCRForCausalLM has no embedding, layers and output matrix apart",
        ),
        (
            "rembert",
            {**TINY, **ATTENTION, "input_embedding_size": 4, "output_embedding_size": 6, "is_decoder": True},
            r"the logits of RemBertForCausalLM are not its output matrix times its last hidden state, .*; wrap it by",
        ),
    ],
)
def test_what_cannot_be_taken_apart_is_one_sentence(model_type: str, sizes: dict[str, Any], sentence: str) -> None:
    for source in ({"model": made(model_type, **sizes)}, {"config": {"model_type": model_type, **sizes}}):
        with pytest.raises(ValueError, match=f"^HuggingFaceTrunk: {sentence}"):
            HuggingFaceTrunk(**source)


SMALL_BART = {"vocab_size": VOCAB, "d_model": WIDTH, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 8}
SMALL_BART |= {"decoder_attention_heads": 2, "max_position_embeddings": 48}
SMALL_BERT = {**TINY, "intermediate_size": 12, "num_attention_heads": 2, "is_decoder": True}


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("bart", SMALL_BART),
        ("trocr", SMALL_BART),
        ("bert", SMALL_BERT),
        ("rembert", SMALL_BERT | {"input_embedding_size": 4, "output_embedding_size": 6}),
    ],
)
def test_the_way_out_on_the_page_works_for_them(model_type: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    page = (ROOT / "docs/trunks.md").read_text(encoding="utf-8")
    (code,) = (
        block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "class WholeTrunk" in block
    )
    names: dict[str, Any] = {}
    exec(compile(code, "trunks.md", "exec"), names)
    own = made(model_type, **sizes)
    own.save_pretrained(tmp_path)
    trunk = names["WholeTrunk"](config={"model_type": model_type, **sizes}, pretrained=str(tmp_path), max_positions=40)
    heads = ResidualHeads(d_model=trunk.d_model, num_horizons=2)
    bias = own.get_output_embeddings().bias is not None
    model = MTPModel(trunk=trunk, heads=heads, tie_embeddings=False, output_bias=bias).eval()
    own.generation_config.eos_token_id = own.generation_config.forced_eos_token_id = None
    prompt = [5, 3, 7, 4]
    wanted = own.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    assert SpeculativeDecoder().generate(model, [prompt], max_new_tokens=6).tokens == [wanted]


@pytest.mark.parametrize(
    ("model_type", "cap", "sizes"),
    [
        ("gemma2", "final_logit_softcapping", SMALL_GEMMA),
        (
            "gemma3n_text",
            "final_logit_softcapping",
            SMALL_GEMMA
            | {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
            | {"laurel_rank": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
            | {"activation_sparsity_pattern": [0.0, 0.0]},
        ),
        (
            "recurrent_gemma",
            "logits_soft_cap",
            SMALL_GEMMA | {"lru_width": WIDTH, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
        ),
    ],
)
def test_the_way_out_of_a_cap_on_logits_works(model_type: str, cap: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """What the error says is done, by folder, by configuration and in memory, and gives what generate gives."""
    own = made(model_type, **sizes)
    own.save_pretrained(tmp_path)
    for source in ({"pretrained": str(tmp_path)}, {"config": {"model_type": model_type, **sizes}}):
        with pytest.raises(
            ValueError, match=rf"caps its logits \({cap} is 30\.0\).*load it with config=\{{'{cap}': None"
        ):
            HuggingFaceTrunk(**source)
    with pytest.raises(ValueError, match=rf"so set model\.config\.{cap} = 1e30 if that is enough\.$"):
        HuggingFaceTrunk(own)
    prompt = [5, 3, 7, 4, 9]
    wanted = own.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    HuggingFaceTrunk(config={"model_type": model_type, **sizes, cap: None})
    heads = {"heads": ResidualHeads, "num_horizons": 2}
    by_folder = MTPModel.from_hugging_face(tmp_path, config={cap: None}, **heads)
    setattr(own.config, cap, 1e30)
    by_folder.save_pretrained(tmp_path / "ours")
    again, _ = MTPModel.from_pretrained(tmp_path / "ours")
    for model in (by_folder, again, MTPModel.from_hugging_face(own, **heads)):
        assert SpeculativeDecoder().generate(model, [prompt], max_new_tokens=6).tokens == [wanted]


@pytest.mark.parametrize("model_type", RECURRENT)
def test_infinity_in_a_configuration_is_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    own, tokens = made(model_type, **RECURRENT[model_type]), random_tokens(2, 9)
    model = MTPModel.from_hugging_face(own, heads=ResidualHeads, num_horizons=2)
    model.save_pretrained(tmp_path)
    again, _ = MTPModel.from_pretrained(tmp_path)
    assert describe(again) == describe(model)
    with torch.no_grad():
        assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    prompts = tokens.tolist()
    plain = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=4).tokens
    assert SpeculativeDecoder().generate(again, prompts, max_new_tokens=4).tokens == plain


def test_experts_are_saved_and_loaded_in_float64(tmp_path: Path) -> None:
    with float64():
        trunk = HuggingFaceTrunk(config=CONFIGS["mixtral"])
        model = MTPModel(trunk=trunk, heads=ResidualHeads(d_model=WIDTH, num_horizons=2)).eval()
    tokens = random_tokens(2, 9)
    model.save_pretrained(tmp_path)
    again, _ = MTPModel.from_pretrained(tmp_path)
    assert again.unembedding.weight.dtype == torch.float64
    with torch.no_grad():
        assert_same(logits_of(again, tokens), logits_of(model, tokens), 1e-6)
        assert logits_of(model.float().double(), tokens).dtype == torch.float64


def test_weights_that_are_views_are_saved(tmp_path: Path) -> None:
    own = made("llama", **TINY, **ATTENTION)
    both = torch.randn(24, WIDTH)
    own.model.layers[0].mlp.up_proj.weight = nn.Parameter(both[:12])
    own.model.layers[0].mlp.gate_proj.weight = nn.Parameter(both[12:])
    model = MTPModel.from_hugging_face(own, heads=ResidualHeads, num_horizons=2)
    model.save_pretrained(tmp_path)
    again, _ = MTPModel.from_pretrained(tmp_path)
    assert torch.equal(again.trunk.model.layers[0].mlp.gate_proj.weight, both[12:])


def test_a_model_that_reads_images_too_is_taken_for_its_text(tmp_path: Path) -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "text_config": SMALL_GEMMA | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        "vision_config": vision | {"image_size": 16, "patch_size": 8},
    }
    own = made("gemma3", **parts, mm_tokens_per_image=4, image_token_index=10, boi_token_index=9, eoi_token_index=9)
    own.generation_config.eos_token_id = None
    prompt = [5, 3, 7, 4]
    wanted = own.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    model = MTPModel.from_hugging_face(own, heads=ResidualHeads, num_horizons=2)
    model.save_pretrained(tmp_path)
    for each in (model, MTPModel.from_pretrained(tmp_path)[0]):
        assert SpeculativeDecoder().generate(each, [prompt], max_new_tokens=6).tokens == [wanted]
    assert describe(model.trunk)["init_args"]["config"]["model_type"] == "gemma3_text"
