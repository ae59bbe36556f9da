"""Tiny models of transformers, one of each kind, and a tokenizer for them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from mtp_modules.trunks import HuggingFaceTrunk
from tests.helpers import MAX_POSITIONS, VOCAB, WIDTH, float64, randomise

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_POSITIONS,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "head_dim": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "llama_tied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 4},
    "gpt2": {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": MAX_POSITIONS, **_ENDS}
    | {"vocab_size": VOCAB},
    "gemma3": {"model_type": "gemma3_text", **_SIZES, **_ENDS, **_MIXED},
    "gemma2": {"model_type": "gemma2", **_SIZES, **_ENDS, **_MIXED, "final_logit_softcapping": None},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 4},
    "mixtral": {"model_type": "mixtral", **_SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
    "granite": {"model_type": "granite", **_SIZES, "logits_scaling": 8.0},
    "opt": {"model_type": "opt", **_SIZES, **_ENDS, "ffn_dim": 12, "word_embed_proj_dim": WIDTH},
    "deepseek": {"model_type": "deepseek_v3", **_SIZES, "num_key_value_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4}
    | {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "first_k_dense_replace": 1, "n_group": 1}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "topk_group": 1},
    "phi": {"model_type": "phi", **_SIZES, "partial_rotary_factor": 0.5},
    "mamba": {
        "model_type": "mamba",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "state_size": 4,
        "time_step_rank": 2,
        "conv_kernel": 3,
    },
}
REPLAYED = {"gemma2", "mamba"}
"""Those that read the whole text again: one caps its attention's scores, the other has no keys."""


def make_trunk(name: str, *, seed: int = 0, **options: Any) -> HuggingFaceTrunk:
    """Build one of ``CONFIGS`` in float64, every parameter large enough to matter."""
    with float64():
        trunk = HuggingFaceTrunk(config=CONFIGS[name], **options)
    randomise(trunk, seed)
    return trunk.eval()


def save_model(name: str, folder: Path, *, seed: int = 0) -> Any:
    """Write one of ``CONFIGS`` as transformers does, and return its own model."""
    given = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed)
    head = model.get_output_embeddings()
    with torch.no_grad():
        if head.weight is not model.get_input_embeddings().weight:
            nn.init.normal_(head.weight)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a vocabulary of ``VOCAB`` bytes and merges, as transformers does."""
    letters = ["<end>", "a", "b", "c", "Ġ", "Ċ"]
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a"), ("Ġ", "b"), ("c", "c")]
    words = [*letters, *("".join(pair) for pair in merges)]
    fast = FastTokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>").save_pretrained(folder)
