"""EAGLE-3: one layer over fused features, under the names of its released checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.heads import FusedFeatureHeads
from mtp_modules.heads.fused_module import SideBySideModule
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.drafters import (
    check_fits,
    drafter_config,
    flat,
    read_embedding,
    read_layers,
    read_outputs,
    refuse_entries,
    write_outputs,
)
from mtp_modules.interop.format import Format, Wanted, attach_heads, needed_base
from mtp_modules.interop.layers import join_gate_up, join_qkv, shape_of, split_gate_up, split_qkv
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import read_sizes
from mtp_modules.layers.transformer import RMSNorm
from mtp_modules.model import MTPModel

_PREFIX, _OTHER_PREFIX = "midlayer.", "layers.0."
_OURS = {
    "use_aux_hidden_state": True,
    "num_hidden_layers": 1,
    "logit_scale": 1.0,
    "mlp_bias": False,
    "parallel_drafting": False,
}


class Eagle3(Format):
    """FusedFeatureHeads of ``merge=False`` as a drafter of EAGLE-3, also with the norms of EAGLE-3.1.

    The layers of the trunk are numbered by how many layers come before the state that is read: layer 0 of our trunks is
    number 1. Horizons beyond the first may predict a part of the vocabulary: ``d2t`` holds the offset of each of its
    tokens. Files of speculators are read too. Li et al. 2025 (arXiv 2503.01840).
    """

    name = "eagle3"
    keeps_trunk = False
    draft_vocabulary = True
    method = "eagle3"
    takes: ClassVar[Takes] = {
        "concatenation": ("embedding_first",),
        "trunk_state": ("before_norm",),
        "chain_state": ("before_norm", "after_norm"),
        "position_0": ("token",),
    }

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        heads, _ = self._parts(model)
        chain = "after_norm" if heads.drafter.chain_norm else "before_norm"
        return Conventions("embedding_first", trunk_state="before_norm", chain_state=chain, position_0="token")

    def stated(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return which state is passed on."""
        return {"chain_state": "after_norm" if flat(config).get("norm_output") else "before_norm"}

    def _parts(self, model: MTPModel) -> tuple[FusedFeatureHeads, SideBySideModule]:
        heads = model.heads
        if not isinstance(heads, FusedFeatureHeads):
            refuse(
                self.name,
                f"the format stores FusedFeatureHeads, the model has {type(heads).__name__}; see docs/interop.md.",
            )
        check_fits(self.name, model, heads.embedding_width)
        step = heads.drafter.steps[0]
        if not isinstance(step, SideBySideModule):
            refuse(
                self.name,
                "the layer of this format attends over token and state side by side, and merge is True; train with "
                "merge=False.",
            )
        return heads, step

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the layer, the fusing matrix and the norms."""
        heads, step = self._parts(model)
        layer, norms = step.layer, cast("Sequence[RMSNorm]", heads.feature_norms)
        written: dict[str, Tensor] = {
            "fc.weight": heads.fuse.weight,
            f"{_PREFIX}input_layernorm.weight": step.token_norm.weight,
            f"{_PREFIX}hidden_norm.weight": step.state_norm.weight,
            f"{_PREFIX}post_attention_layernorm.weight": layer.ffn_norm.weight,
            f"{_PREFIX}self_attn.o_proj.weight": layer.attention.out.weight,
            f"{_PREFIX}mlp.down_proj.weight": layer.ffn.down.weight,
            "norm.weight": cast("RMSNorm", heads.drafter.norms[0]).weight,
        }
        for name, matrix in zip("qkv", split_qkv(layer.attention), strict=True):
            written[f"{_PREFIX}self_attn.{name}_proj.weight"] = matrix
        for name, matrix in zip(("gate", "up"), split_gate_up(layer.ffn), strict=True):
            written[f"{_PREFIX}mlp.{name}_proj.weight"] = matrix
        one_norm = len(norms) == 1
        for index, norm in enumerate(norms):
            written["input_norm.weight" if one_norm else f"fc_norm.{index}.weight"] = norm.weight
        outputs, entries = write_outputs(model)
        sizes = drafter_config(
            model,
            shape_of(layer)._replace(d_model=heads.d_model),
            step.state_norm,
            num_layers=1,
            max_positions=heads.max_positions,
            rope_base=heads.drafter.rotary.base,
        )
        layers = sizes["eagle_aux_hidden_state_layer_ids"]
        return written | outputs, sizes | entries | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "norm_before_residual": step.norm_before_residual,
            "norm_before_fc": one_norm,
            "fc_norm": len(norms) > 1,
            "norm_output": heads.drafter.chain_norm,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers, "use_aux_hidden_state": True},
        }

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        config, base = flat(config, norm_before_residual=True), needed_base(self.name, wanted.trunk)
        refuse_entries(self.name, {**config, **(config.get("eagle_config") or {})}, _OURS)
        sizes = read_sizes(self.name, config, qk_norm=False, any_head_dim=True)
        width, shape = base.trunk.d_model, sizes.layer
        layers = read_layers(config, None, base)
        read_embedding(tensors, sizes.vocab_size, base)
        if wanted.num_horizons is None and not config.get("speculative_tokens"):
            refuse(
                self.name, "the file does not say how many tokens are drafted; give num_horizons, one more than those."
            )
        one_norm = (config.get("eagle_config") or {}).get("norm_before_fc", config.get("norm_before_fc", False))
        heads = FusedFeatureHeads(
            d_model=shape.d_model,
            num_horizons=wanted.num_horizons or config["speculative_tokens"] + 1,
            num_heads=shape.num_heads,
            num_features=len(layers),
            num_kv_heads=shape.num_kv_heads,
            ffn_width=shape.ffn_width,
            max_positions=max(sizes.max_positions, base.trunk.max_positions or 0),
            rope_base=sizes.rope_base,
            merge=False,
            norm_before_residual=bool(config.get("norm_before_residual", False)),
            norm_before_fc=bool(one_norm),
            fc_norm=bool(config.get("fc_norm", False)),
            norm_output=wanted.conventions.chain_state == "after_norm",
            norm_eps=sizes.norm_eps,
            head_dim=None if shape.head_dim * shape.num_heads == shape.d_model else shape.head_dim,
        )
        outputs, num_draft_tokens = read_outputs(tensors, config, base)
        state = outputs | self._read_layer(tensors, heads, width)
        return attach_heads(self.name, base, heads, state, num_draft_tokens=num_draft_tokens, feature_layers=layers)

    def _read_layer(self, tensors: Tensors, heads: FusedFeatureHeads, width: int) -> dict[str, Tensor]:
        """Take the tensors of the layer and the norms, under our names."""
        prefix = _OTHER_PREFIX if f"{_OTHER_PREFIX}hidden_norm.weight" in tensors else _PREFIX
        layer, ours = heads.drafter.steps[0].layer, "heads.drafter.steps.0."
        attention, ffn = layer.attention, layer.ffn.down.in_features
        rows = [count * attention.head_dim for count in (attention.num_heads, *[attention.num_kv_heads] * 2)]
        queries, keys, values = (
            tensors.take(f"{prefix}self_attn.{name}_proj.weight", count, 2 * width)
            for name, count in zip("qkv", rows, strict=True)
        )
        gate, up = (tensors.take(f"{prefix}mlp.{name}_proj.weight", ffn, width) for name in ("gate", "up"))
        state = {
            "heads.fuse.weight": tensors.take("fc.weight", width, heads.num_features * width),
            "heads.drafter.norms.0.weight": tensors.take("norm.weight", width),
            f"{ours}token_norm.weight": tensors.take(f"{prefix}input_layernorm.weight", width),
            f"{ours}state_norm.weight": tensors.take(f"{prefix}hidden_norm.weight", width),
            f"{ours}layer.ffn_norm.weight": tensors.take(f"{prefix}post_attention_layernorm.weight", width),
            f"{ours}layer.attention.qkv.weight": join_qkv(queries, keys, values, attention.head_dim),
            f"{ours}layer.attention.out.weight": tensors.take(f"{prefix}self_attn.o_proj.weight", width, rows[0]),
            f"{ours}layer.ffn.gate_up.weight": join_gate_up(gate, up),
            f"{ours}layer.ffn.down.weight": tensors.take(f"{prefix}mlp.down_proj.weight", width, ffn),
        }
        norms = cast("Sequence[RMSNorm]", heads.feature_norms)
        for index, norm in enumerate(norms):
            name = "input_norm.weight" if len(norms) == 1 else f"fc_norm.{index}.weight"
            state[f"heads.feature_norms.{index}.weight"] = tensors.take(name, *norm.weight.shape)
        return state
