"""MiMo: modules under ``model.mtp_layers.{i}`` and a Qwen2 trunk."""

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

_STYLE = LayerStyle(bias=True, qk_norm=False)


class MiMo(Format):
    """SequentialHeads and their trunk in MiMo's names. Its layers are those of Qwen2; biases are written as 0.

    The configuration names ``MiMoForCausalLM`` as a ``qwen2``: transformers does not know the released ``mimo``, and
    vLLM, which does, reads configurations with transformers.
    """

    name = "mimo"
    keeps_trunk = True
    model_types = ("qwen2", "mimo")
    method = "mtp"
    vllm_chain = "after_norm"
    vllm_state = "before_norm"
    vllm_masks_first = True
    takes: ClassVar[Takes] = {
        "concatenation": ("state_first",),
        "trunk_state": ("after_norm",),
        "chain_state": ("after_norm",),
        "position_0": ("token", "zero"),
    }

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        return conventions_of(sequential_heads(self.name, model))

    def trunk(self, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trunk as a Qwen2 model."""
        config = trunk_config(self.name, model, _STYLE)
        config |= {"model_type": "qwen2", "use_sliding_window": False}
        return write_trunk(self.name, model, _STYLE), config

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the modules."""
        heads = sequential_heads(self.name, model)
        check_sizes(self.name, model, heads, read_sizes(self.name, config, qk_norm=False))
        return write_modules(self.name, heads, _names, _STYLE), {
            "architectures": ["MiMoForCausalLM"],  # also where they are added to a Qwen2
            "num_nextn_predict_layers": len(heads.steps),
        }

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        sizes = read_sizes(self.name, config, qk_norm=False)
        count = field(self.name, config, "num_nextn_predict_layers")
        heads = build_heads(
            self.name, sizes, sizes.layer, wanted.conventions, count=count, num_horizons=wanted.num_horizons
        )
        read = read_modules(tensors, _names, count, _STYLE, sizes.layer)
        if wanted.trunk is None:
            trunk, state = read_trunk(tensors, sizes, _STYLE)
            return fill(trunk, heads, state | read, tie_embeddings=sizes.tied)
        for prefix in ("model.embed_tokens.", "model.norm.", "lm_head.", "model.layers."):
            tensors.drop(prefix)
        return attach_heads(self.name, wanted.trunk, heads, read)


def _names(index: int) -> ModuleNames:
    prefix = f"model.mtp_layers.{index}."
    return ModuleNames(
        token_norm=f"{prefix}token_layernorm.weight",
        state_norm=f"{prefix}hidden_layernorm.weight",
        merge=f"{prefix}input_proj.weight",
        out_norm=f"{prefix}final_layernorm.weight",
        layer=prefix,
    )
