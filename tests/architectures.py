"""Every causal architecture of transformers, tiny: as a trunk it decodes what ``generate`` does, or it is rejected.

``python -m tests.architectures`` judges all of them, each in a process of its own, and writes the table of
``docs/architectures.md``; names as arguments print those only.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mtp_modules import AutoregressiveDecoder, MTPModel, ResidualHeads, SpeculativeDecoder
from mtp_modules.core.checks import InputError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architectures.md"
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NEW = 6
EQUAL, REJECTED, WRONG, UNBUILT = "equal", "rejected", "not equal", "not built"

_BY_VALUE: dict[int | None, str] = {
    0: "pad_token_id num_kv_shared_layers",
    1: """n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace mamba_n_groups n_groups
        mamba_ngroups attn_layer_offset expert_layer_offset bos_token_id decoder_start_token_id is_decoder""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts
        attn_layer_period n_mamba_heads expert_layer_period linear_num_key_heads eos_token_id depth
        layer_group_size""",
    4: """num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim sliding_window attention_window_size
        rotary_dim num_heads linear_num_heads time_step_rank mamba_dt_rank mamba_n_heads mamba_num_heads
        linear_num_value_heads index_topk""",
    8: """head_dim dim_head q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim index_head_dim mamba_d_state state_size
        ssm_state_size linear_key_head_dim linear_value_head_dim linear_head_dim hidden_size_per_layer_input o_lora_rank
        global_head_dim patch_size""",
    16: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size mamba_d_head mamba_head_dim
        chunk_size mamba_chunk_size image_size index_n_heads""",
    32: """hidden_size n_embd d_model dim emb_dim embedding_size n_embed word_embed_proj_dim input_embedding_size
        output_embedding_size lru_width backbone_hidden_size out_hidden_size projection_dim""",
    48: """intermediate_size ffn_dim n_inner d_ff dim_ff dff ffn_hidden_size d_inner decoder_ffn_dim
        encoder_ffn_dim""",
    60: "image_token_id image_token_index boi_token_id eoi_token_id",
    61: "video_token_id audio_token_id vision_start_token_id vision_end_token_id",
    64: "vocab_size unpadded_vocab_size vocab_size_per_layer_input mamba_d_ssm",
    128: "max_position_embeddings n_positions n_ctx max_seq_len block_size",
    None: """final_logit_softcapping logit_softcap logits_soft_cap output_logits_soft_cap output_logit_soft_cap""",
}
SIZES = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
_BOTH = ["linear_attention", "full_attention"]
OTHERWISE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 64},
    "bamba": {"attn_layer_indices": [1]},
    "kimi_linear": {"head_dim": 8, "layer_types": _BOTH, "model_max_length": 128},
    "qwen3_5_text": {"layer_types": _BOTH},
    "qwen3_5_moe_text": {"layer_types": _BOTH},
    "qwen4_exp_text": {"layer_types": _BOTH},
    "zaya": {"num_experts_per_tok": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]},
    "qwen3_next": {"layer_types": _BOTH},
    "olmo_hybrid": {"layer_types": _BOTH},
    "minimax": {"layer_types": _BOTH},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "longcat_flash": {"num_layers": 1, "num_hidden_layers": 1},
}
"""What the table of sizes does not say right."""
_BUILT = {"uncapped": "its cap on logits taken away"}
Judgement = dict[str, Any]


def tiny(model_type: str) -> dict[str, Any]:
    """Return the arguments of a small configuration, those of its parts included."""
    kind = transformers.CONFIG_MAPPING[model_type]
    given = _sized(kind)
    for part, of_part in (getattr(kind, "sub_configs", None) or {}).items():
        if dataclasses.is_dataclass(of_part):
            given[part] = _sized(of_part) | OTHERWISE.get(of_part.model_type, {})
    return given | OTHERWISE.get(model_type, {})


def _sized(kind: type) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = {name: value for name, value in SIZES.items() if name in fields}
    if "qk_rope_head_dim" in fields:
        given.pop("head_dim", None)
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # every head has keys of its own
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= {"is_decoder": True} if "is_decoder" in fields else {}
    return given


def judge(model_type: str) -> Judgement:
    """Build an architecture, decode with it in every way, and say how it went."""
    torch.manual_seed(0)
    sizes = tiny(model_type)
    caps = {name: None for name, value in sizes.items() if value is None}
    how: Judgement = {"name": model_type}
    try:
        from_type = {name: value for name, value in sizes.items() if name not in caps}
        own = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **from_type)
        ).eval()
        with torch.no_grad():
            for parameter in own.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
        prompts = [[7, 9, 33, 21, 50, 12], [40, 8, 15], [11]]
        wanted = [_generated(own, prompt) for prompt in prompts]
    except Exception as error:
        return how | {"result": UNBUILT, "why": _sentence(error)}
    make = {"heads": ResidualHeads, "num_horizons": 4}
    try:
        with tempfile.TemporaryDirectory() as folder:
            own.save_pretrained(folder)
            model = MTPModel.from_hugging_face(folder, config=caps, **make)
        in_memory = None if caps else MTPModel.from_hugging_face(own, **make)
    except InputError as error:
        return how | {"result": REJECTED, "why": str(error).partition(": ")[2]}
    how |= {"keeps_keys": model.trunk.keeps_keys, "uncapped": bool(caps)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, _ = MTPModel.from_pretrained(folder)
    plain, drafted = AutoregressiveDecoder(), SpeculativeDecoder(num_drafts=3)
    found = {
        "plain": [plain.generate(model, [prompt], max_new_tokens=NEW).tokens[0] for prompt in prompts],
        "drafted": [drafted.generate(model, [prompt], max_new_tokens=NEW).tokens[0] for prompt in prompts],
        "ragged": drafted.generate(model, prompts, max_new_tokens=NEW).tokens,
        "loaded": drafted.generate(loaded, prompts, max_new_tokens=NEW).tokens,
    }
    if in_memory is not None:
        found["in memory"] = drafted.generate(in_memory, prompts, max_new_tokens=NEW).tokens
    wrong = [name for name, tokens in found.items() if tokens != wanted]
    if wrong and wanted != (uncached := [_generated(own, prompt, use_cache=False) for prompt in prompts]):
        how["note"] = "to `generate` without a cache; its cache gives other tokens than its own forward pass"
        wrong = [name for name, tokens in found.items() if tokens != uncached]
    how["distinct"] = len({token for row in wanted for token in row})
    return how | ({"result": WRONG, "why": f"{', '.join(wrong)}"} if wrong else {"result": EQUAL})


def _generated(own: Any, prompt: list[int], *, use_cache: bool = True) -> list[int]:
    """Return the most likely continuation, by transformers."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(own.config, name, None) is not None:
            setattr(own.config, name, 1e30)  # the same choices
    own.generation_config.eos_token_id = None  # also from another configuration it would be taken over
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=use_cache)
    given = torch.tensor([prompt])
    tokens = own.generate(given, generation_config=config, attention_mask=torch.ones_like(given))
    return [int(token) for token in tokens[0, len(prompt) :]]


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def judged_apart(names: Sequence[str], *, seconds: float = 120.0, workers: int = 2) -> Iterator[Judgement]:
    """Judge each in a process of its own, a few at a time: some take long, or more memory than there is.

    The server that they are forked from imports ``transformers`` once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.architectures"])

    def one(name: str) -> Judgement:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "judgement.json"
            process = context.Process(target=_write_judgement, args=(name, str(file)))
            process.start()
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()
                return {"name": name, "result": UNBUILT, "why": f"takes longer than {seconds:.0f} s, even tiny"}
            if not file.is_file():
                return {"name": name, "result": WRONG, "why": f"died with exit code {process.exitcode}"}
            judgement: Judgement = json.loads(file.read_text(encoding="utf-8"))
            return judgement

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, names)


def _write_judgement(name: str, path: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        judgement = judge(name)
    except Exception as error:
        judgement = {"name": name, "result": WRONG, "why": _sentence(error)}
    Path(path).write_text(json.dumps(judgement), encoding="utf-8")


def table(judgements: list[Judgement]) -> str:
    """Return the table of the page."""
    count = Counter(each["result"] for each in judgements)
    lines = [
        f"transformers {transformers.__version__} has {len(judgements)} architectures with a causal language model: "
        f"{count[EQUAL]} decode what `generate` does, {count[REJECTED]} are rejected, {count[WRONG]} differ, and "
        f"{count[UNBUILT]} could not be judged.",
        "",
        "| architecture | result | decodes by | note |",
        "|---|---|---|---|",
    ]
    for each in judgements:
        by = {True: "KV cache", False: "recomputing"}.get(each.get("keeps_keys"), "")
        note = each.get("why") or each.get("note") or (_BUILT["uncapped"] if each.get("uncapped") else "")
        lines.append(f"| `{each['name']}` | {each['result']} | {by} | {note.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def written(page: str) -> dict[str, str]:
    """Return the results that a page has, by architecture."""
    return dict(re.findall(r"^\| `([\w.-]+)` \| ([\w ]+) \|", page, re.M))


def main(names: list[str]) -> None:
    """Judge, print, and write the page if all were judged."""
    judgements = []
    for each in judged_apart(names or NAMES, workers=os.cpu_count() or 2):
        print(json.dumps(each), flush=True)
        judgements.append(each)
    if not names:
        before, mark, _ = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
        PAGE.write_text(before + mark + table(judgements) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
