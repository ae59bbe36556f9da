"""Our transformer layers under the tensor names of Hugging Face transformers."""

from typing import NamedTuple

import torch
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.interop.latents import deinterleave, interleave, read_latents, write_latents
from mtp_modules.interop.tensors import Tensors
from mtp_modules.layers.feed_forward import SwiGLU
from mtp_modules.layers.transformer import Attention, RMSNorm, TransformerLayer


class Experts(NamedTuple):
    """A mixture of experts that represents one dense layer: its shared expert is that layer, routed experts output 0.

    Attributes:
        num: Number of routed experts.
        width: Feed-forward width of a routed expert.
        shared: Width of the shared expert as a multiple of ``width``.
    """

    num: int
    width: int
    shared: int


class LayerStyle(NamedTuple):
    """How the layers of a format differ from ours.

    Attributes:
        bias: Queries, keys and values have biases (Qwen2); we write zeros.
        gate: The output of attention passes an elementwise gate (Qwen3-Next). We write rows of zeros, which make the
            gate 1/2, and multiply the output matrix by 2: powers of two, so nothing is rounded.
        unit_offset: Norms scale by ``1 + w`` (Qwen3-Next).
        qk_norm: Whether queries and keys are normalised; ``None`` if the format allows both.
        experts: The feed-forward layer is a mixture of experts.
        latent: Keys and values come from latents (DeepSeek-V3); see :mod:`mtp_modules.interop.latents`.
    """

    bias: bool = False
    gate: bool = False
    unit_offset: bool = False
    qk_norm: bool | None = None
    experts: Experts | None = None
    latent: bool = False


class LayerShape(NamedTuple):
    """Sizes of a layer."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    qk_norm: bool
    head_dim: int


def shape_of(layer: TransformerLayer) -> LayerShape:
    """Return the sizes of a layer.

    Args:
        layer: A layer that is not sharded over processes.
    """
    attention = layer.attention
    return LayerShape(
        attention.qkv.in_features,
        attention.num_heads,
        attention.num_kv_heads,
        layer.ffn.down.in_features,
        attention.query_norm is not None,
        attention.head_dim,
    )


def split_qkv(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused matrix of attention into queries, keys and values, head by head.

    Args:
        attention: Attention with a fused matrix.
    """
    grouped = torch.unflatten(attention.qkv.weight.detach(), 0, (attention.num_kv_heads, -1, attention.head_dim))
    return grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)


def join_qkv(
    queries: Float[Tensor, "Q D"], keys: Float[Tensor, "S D"], values: Float[Tensor, "S D"], head_dim: int
) -> Float[Tensor, "R D"]:
    """Return the fused matrix of queries, keys and values; see :class:`~mtp_modules.layers.transformer.Attention`.

    Args:
        queries: Query matrix, head by head.
        keys: Key matrix, head by head.
        values: Value matrix, head by head.
        head_dim: Width of a head.
    """
    keys, values = (torch.unflatten(part, 0, (-1, 1, head_dim)) for part in (keys, values))
    grouped = torch.unflatten(queries, 0, (len(keys), -1, head_dim))
    return torch.cat((grouped, keys, values), dim=1).flatten(0, 2)


def split_gate_up(ffn: SwiGLU) -> tuple[Tensor, Tensor]:
    """Split the fused matrix of a SwiGLU into the gate and up projections.

    Args:
        ffn: Feed-forward layer with a fused matrix.
    """
    blocks = torch.unflatten(ffn.gate_up.weight.detach(), 0, (ffn.num_blocks, 2, -1))
    return blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)


def join_gate_up(gate: Float[Tensor, "F D"], up: Float[Tensor, "F D"]) -> Float[Tensor, "G D"]:
    """Return the fused matrix of gate and up projections; see :class:`~mtp_modules.layers.feed_forward.SwiGLU`.

    Args:
        gate: Gate projection.
        up: Up projection.
    """
    num_blocks = SwiGLU.blocks_of(len(gate))
    return torch.stack([torch.unflatten(part, 0, (num_blocks, -1)) for part in (gate, up)], dim=1).flatten(0, 2)


def write_norm(owner: str, name: str, norm: nn.Module, style: LayerStyle) -> Tensor:
    """Return the gain of a norm as a format stores it.

    Args:
        owner: Name of the format.
        name: Tensor name of the gain.
        norm: Our norm.
        style: Layer style of the format.

    Raises:
        ValueError: If ``1 + w`` would round the gain in a 16-bit type.
    """
    assert isinstance(norm, RMSNorm)
    gain = norm.weight.detach()
    if not style.unit_offset:
        return gain
    offset = gain - 1
    if gain.dtype.itemsize < 4 and not torch.equal(offset + 1, gain):
        refuse(owner, f"{name} stores gains as 1 + w, which {gain.dtype} would round; export the model in float32.")
    return offset


def read_norm(tensors: Tensors, name: str, width: int, style: LayerStyle) -> Tensor:
    """Take the gain of a norm.

    Args:
        tensors: Tensors of the checkpoint.
        name: Tensor name of the gain.
        width: Expected width.
        style: Layer style of the format.
    """
    gain = tensors.take(name, width)
    return 1 + gain if style.unit_offset else gain


def write_layer(owner: str, layer: TransformerLayer, prefix: str, style: LayerStyle) -> dict[str, Tensor]:
    """Return a layer's tensors under their names in transformers.

    Args:
        owner: Name of the format.
        layer: Our layer.
        prefix: Prefix of the tensor names.
        style: Layer style of the format.
    """
    attention = layer.attention
    queries, keys, values = split_qkv(attention)
    out = attention.out.weight.detach()
    written: dict[str, Tensor] = {}
    if style.bias:
        written |= {
            f"{prefix}self_attn.{name}_proj.bias": part.new_zeros(len(part))
            for name, part in (("q", queries), ("k", keys), ("v", values))
        }
    if style.gate:
        heads = torch.unflatten(queries, 0, (attention.num_heads, attention.head_dim))
        queries, out = torch.cat((heads, torch.zeros_like(heads)), dim=1).flatten(0, 1), 2 * out
    if attention.query_norm is not None and attention.key_norm is not None:
        for short, norm in (("q", attention.query_norm), ("k", attention.key_norm)):
            name = f"{prefix}self_attn.{short}_norm.weight"
            written[name] = write_norm(owner, name, norm, style)
    for short, norm in (("input", layer.attention_norm), ("post_attention", layer.ffn_norm)):
        name = f"{prefix}{short}_layernorm.weight"
        written[name] = write_norm(owner, name, norm, style)
    if style.latent:
        queries = interleave(queries, attention.head_dim)
        written |= write_latents(owner, keys, values, prefix, layer.attention_norm.weight.detach(), attention.num_heads)
    else:
        written |= {f"{prefix}self_attn.k_proj.weight": keys, f"{prefix}self_attn.v_proj.weight": values}
    written |= {f"{prefix}self_attn.q_proj.weight": queries, f"{prefix}self_attn.o_proj.weight": out}
    return written | _write_ffn(layer.ffn, f"{prefix}mlp.", style.experts)


def _write_ffn(ffn: SwiGLU, prefix: str, experts: Experts | None) -> dict[str, Tensor]:
    (gate, up), down = split_gate_up(ffn), ffn.down.weight.detach()
    dense = f"{prefix}shared_experts." if experts else prefix
    written = {f"{dense}gate_proj.weight": gate, f"{dense}up_proj.weight": up, f"{dense}down_proj.weight": down}
    if experts is None:
        return written
    written[f"{prefix}gate.weight"] = gate.new_zeros(experts.num, len(down))
    written[f"{prefix}gate.e_score_correction_bias"] = torch.zeros(experts.num, device=gate.device)
    for expert in range(experts.num):
        for name, shape in (("gate", (experts.width, len(down))), ("up", (experts.width, len(down)))):
            written[f"{prefix}experts.{expert}.{name}_proj.weight"] = gate.new_zeros(shape)
        written[f"{prefix}experts.{expert}.down_proj.weight"] = gate.new_zeros(len(down), experts.width)
    return written


def read_layer(tensors: Tensors, prefix: str, style: LayerStyle, shape: LayerShape) -> dict[str, Tensor]:
    """Take a layer's tensors and return them under our names.

    Args:
        tensors: Tensors of the checkpoint.
        prefix: Prefix of the tensor names.
        style: Layer style of the format.
        shape: Sizes of the layer.

    Raises:
        ValueError: If a tensor is missing, or if the layer has a part that ours does not have.
    """
    width, head_dim = shape.d_model, shape.head_dim
    num_queries, num_keys = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    _refuse_foreign(tensors, prefix, style)
    queries = tensors.take(f"{prefix}self_attn.q_proj.weight", num_queries * (2 if style.gate else 1), width)
    if style.latent:
        queries = deinterleave(queries, head_dim)
        keys, values = read_latents(tensors, prefix, width, head_dim, shape.num_heads)
    else:
        keys = tensors.take(f"{prefix}self_attn.k_proj.weight", num_keys, width)
        values = tensors.take(f"{prefix}self_attn.v_proj.weight", num_keys, width)
    out = tensors.take(f"{prefix}self_attn.o_proj.weight", width, num_queries)
    for name, part in (("q", queries), ("k", keys), ("v", values)):
        bias = f"{prefix}self_attn.{name}_proj.bias"
        if bias in tensors and bool(tensors.take(bias, len(part)).any()):
            refuse(tensors.owner, f"{bias} is not 0, and our layers have no biases; this model cannot be read.")
    if style.gate:
        queries, gates = torch.unflatten(queries, 0, (shape.num_heads, 2, head_dim)).transpose(0, 1).flatten(1, 2)
        if bool(gates.any()):
            refuse(tensors.owner, f"the gates in {prefix}self_attn.q_proj.weight are not 0, and our layers have none.")
        out = out / 2
    read = {"attention.qkv.weight": join_qkv(queries, keys, values, head_dim), "attention.out.weight": out}
    if shape.qk_norm:
        for name, ours in (("q", "query"), ("k", "key")):
            gain = read_norm(tensors, f"{prefix}self_attn.{name}_norm.weight", head_dim, style)
            read[f"attention.{ours}_norm.weight"] = gain
    for name, ours in (("input", "attention"), ("post_attention", "ffn")):
        read[f"{ours}_norm.weight"] = read_norm(tensors, f"{prefix}{name}_layernorm.weight", width, style)
    return read | _read_ffn(tensors, f"{prefix}mlp.", style, shape)


def _read_ffn(tensors: Tensors, prefix: str, style: LayerStyle, shape: LayerShape) -> dict[str, Tensor]:
    if style.experts is not None:
        _drop_zero_experts(tensors, prefix, style.experts, shape.d_model)
        prefix = f"{prefix}shared_experts."
    gate = tensors.take(f"{prefix}gate_proj.weight", shape.ffn_width, shape.d_model)
    up = tensors.take(f"{prefix}up_proj.weight", shape.ffn_width, shape.d_model)
    down = tensors.take(f"{prefix}down_proj.weight", shape.d_model, shape.ffn_width)
    return {"ffn.gate_up.weight": join_gate_up(gate, up), "ffn.down.weight": down}


def _drop_zero_experts(tensors: Tensors, prefix: str, experts: Experts, width: int) -> None:
    """Take and ignore routed experts whose output is 0."""
    tensors.take(f"{prefix}gate.weight", experts.num, width)
    tensors.take(f"{prefix}gate.e_score_correction_bias", experts.num)
    for expert in range(experts.num):
        for name in ("gate", "up"):
            tensors.take(f"{prefix}experts.{expert}.{name}_proj.weight", experts.width, width)
        if bool(tensors.take(f"{prefix}experts.{expert}.down_proj.weight", width, experts.width).any()):
            refuse(
                tensors.owner,
                f"{prefix}experts is a mixture of experts, and our layers are dense; this model cannot be read.",
            )


def _refuse_foreign(tensors: Tensors, prefix: str, style: LayerStyle) -> None:
    for part, what in (
        ("self_attn.kv_a_proj_with_mqa.weight", "DeepSeek-V3's multi-head latent attention"),
        ("linear_attn.A_log", "linear attention"),
    ):
        if f"{prefix}{part}" in tensors and not (style.latent and "kv_a" in part):
            refuse(tensors.owner, f"{prefix}{part} belongs to {what}, which our layers do not have.")
