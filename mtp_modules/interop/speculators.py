"""The MTP draft model of speculators 0.9: one module, applied repeatedly, in its own folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.format import Format, Wanted, attach_heads
from mtp_modules.interop.layers import LayerStyle, shape_of
from mtp_modules.interop.sequential import (
    ModuleNames,
    build_heads,
    conventions_of,
    read_modules,
    sequential_heads,
    write_modules,
)
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import field, read_sizes
from mtp_modules.model import MTPModel

_STYLE = LayerStyle(qk_norm=True)
_PREFIX = "mtp_layers.0."
_NAMES = ModuleNames(
    token_norm=f"{_PREFIX}token_layernorm.weight",
    state_norm=f"{_PREFIX}hidden_layernorm.weight",
    merge=f"{_PREFIX}input_proj.weight",
    out_norm=f"{_PREFIX}final_layernorm.weight",
    layer=_PREFIX,
)


class Speculators(Format):
    """SequentialHeads of one module as a draft model of speculators, with a Qwen3 layer.

    The draft model shares embedding and output matrix with the verifier, which the configuration names. Qwen3's layers
    normalise queries and keys, so the heads must have ``qk_norm``.
    """

    name = "speculators"
    keeps_trunk = False
    unserved = "vLLM 0.32 rejects MTP drafts of speculators; to serve these heads, export them in the format qwen."
    takes: ClassVar[Takes] = {
        "concatenation": ("embedding_first",),
        "trunk_state": ("after_norm",),
        "chain_state": ("after_norm",),
        "position_0": ("token",),
    }

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        return conventions_of(sequential_heads(self.name, model, max_modules=1))

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the module and the whole configuration."""
        heads = sequential_heads(self.name, model, max_modules=1)
        step = heads.steps[0]
        shape = shape_of(step.layer)
        if not shape.qk_norm:
            refuse(self.name, "the layer of this format normalises queries and keys; train heads with qk_norm=True.")
        layer = {
            "model_type": "qwen3",
            "vocab_size": model.trunk.vocab_size,
            "hidden_size": shape.d_model,
            "intermediate_size": shape.ffn_width,
            "num_hidden_layers": 1,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": heads.max_positions,
            "rms_norm_eps": step.state_norm.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": heads.rotary.base},
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": model.unembedding.tied,
        }
        method = {"proposal_type": "greedy", "speculative_tokens": heads.num_horizons - 1}
        written = {
            "architectures": ["MTPDraftModel"],
            "speculators_model_type": "mtp",
            "speculators_version": "0.9.0",
            "num_nextn_predict_layers": 1,
            "transformer_layer_config": layer,
            "speculators_config": {
                "algorithm": "mtp",
                "default_proposal_method": "greedy",
                "proposal_methods": [method],
                "verifier": {"name_or_path": None, "architectures": []},
            },
            "dtype": str(step.merge.weight.dtype).removeprefix("torch."),
        }
        return write_modules(self.name, heads, lambda _: _NAMES, _STYLE), written

    def with_base(self, config: dict[str, Any], place: Path, base: Mapping[str, Any]) -> dict[str, Any]:
        """Name the verifier, whose embedding and output matrix the draft model shares."""
        verifier = {"name_or_path": str(place), "architectures": base["architectures"]}
        return config | {"speculators_config": config["speculators_config"] | {"verifier": verifier}}

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        layer = field(self.name, config, "transformer_layer_config")
        if layer.get("model_type") != "qwen3":
            refuse(self.name, f"the module's layer has model_type {layer.get('model_type')}, only qwen3 is supported.")
        methods = field(self.name, config, "speculators_config").get("proposal_methods") or [{}]
        drafts = field(self.name, methods[0], "speculative_tokens")
        sizes = read_sizes(self.name, layer, qk_norm=True)
        if wanted.trunk is not None and wanted.trunk.trunk.vocab_size != sizes.vocab_size:
            refuse(
                self.name,
                f"vocab_size is {sizes.vocab_size} here and {wanted.trunk.trunk.vocab_size} in the trunk; "
                "give the model that the heads belong to.",
            )
        if wanted.num_horizons not in (None, drafts + 1):
            refuse(self.name, f"num_horizons={wanted.num_horizons} was given, the file has {drafts + 1}.")
        heads = build_heads(self.name, sizes, sizes.layer, wanted.conventions, count=1, num_horizons=drafts + 1)
        read = read_modules(tensors, lambda _: _NAMES, 1, _STYLE, sizes.layer)
        return attach_heads(self.name, wanted.trunk, heads, read)
