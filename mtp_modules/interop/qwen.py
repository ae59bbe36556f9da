"""Qwen3.5 (and Qwen3-Next): one module under ``mtp.`` and a trunk under its names in transformers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from mtp_modules.core.shapes import Tensor
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.format import Format, Wanted, attach_heads, fill
from mtp_modules.interop.layers import LayerStyle
from mtp_modules.interop.sequential import (
    ModuleNames,
    build_heads,
    check_sizes,
    conventions_of,
    read_modules,
    sequential_heads,
    write_modules,
)
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import field, read_sizes, read_trunk, trunk_config, write_trunk
from mtp_modules.model import MTPModel

_STYLE = LayerStyle(gate=True, unit_offset=True, qk_norm=True)
_NAMES = ModuleNames(
    token_norm="mtp.pre_fc_norm_embedding.weight",
    state_norm="mtp.pre_fc_norm_hidden.weight",
    merge="mtp.fc.weight",
    out_norm="mtp.norm.weight",
    layer="mtp.layers.0.",
)


class Qwen(Format):
    """SequentialHeads of one module and their trunk as a dense Qwen3.5.

    Its layers normalise queries and keys, so trunk and heads must have ``qk_norm``. Its gates are written as 1/2, and
    its linear attention is not used. Gains of norms are stored as ``1 + w``: exact from 0.5 to 2, rounded elsewhere.
    """

    name = "qwen"
    keeps_trunk = True
    model_types = ("qwen3_5_text", "qwen3_next")
    method = "mtp"
    vllm_chain = "after_norm"
    takes: ClassVar[Takes] = {
        "concatenation": ("embedding_first",),
        "trunk_state": ("after_norm",),
        "chain_state": ("after_norm",),
        "position_0": ("token",),
    }

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        return conventions_of(sequential_heads(self.name, model, max_modules=1))

    def trunk(self, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trunk as layers with full attention."""
        config = trunk_config(self.name, model, _STYLE)
        config |= {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "layer_types": ["full_attention"] * config["num_hidden_layers"],
            "attn_output_gate": True,
        }
        return write_trunk(self.name, model, _STYLE), config

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the module."""
        heads = sequential_heads(self.name, model, max_modules=1)
        check_sizes(
            self.name, model, heads, read_sizes(self.name, _of_heads(config), qk_norm=True, rotary_fraction=0.25)
        )
        return write_modules(self.name, heads, lambda _: _NAMES, _STYLE), {"mtp_num_hidden_layers": 1}

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        own = wanted.trunk is None
        sizes = read_sizes(self.name, config if own else _of_heads(config), qk_norm=True, rotary_fraction=0.25)
        count = field(self.name, config, "mtp_num_hidden_layers", 1)
        heads = build_heads(
            self.name, sizes, sizes.layer, wanted.conventions, count=count, num_horizons=wanted.num_horizons
        )
        if own:
            trunk, state = read_trunk(tensors, sizes, _STYLE)
            state |= read_modules(tensors, lambda _: _NAMES, 1, _STYLE, sizes.layer)
            return fill(trunk, heads, state, tie_embeddings=sizes.tied)
        state = read_modules(tensors, lambda _: _NAMES, 1, _STYLE, sizes.layer)
        tensors.drop("model.")
        tensors.drop("lm_head.")
        return attach_heads(self.name, wanted.trunk, heads, state)


def _of_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the module, which has full attention whatever the trunk has."""
    return {name: value for name, value in config.items() if name != "layer_types"}
