"""The release of Gloeckle et al. 2024: a Llama with ``extra_heads``, in ``consolidated.pth`` and ``params.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.heads import ParallelHeads
from mtp_modules.interop import files
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.format import Format, Wanted, fill
from mtp_modules.interop.layers import join_gate_up, join_qkv, shape_of, split_gate_up, split_qkv
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import field, transformer_trunk
from mtp_modules.layers.transformer import TransformerLayer
from mtp_modules.model import MTPModel
from mtp_modules.trunks import TransformerTrunk

WEIGHTS, PARAMS = "consolidated.pth", "params.json"
_POSITIONS = 4096
"""Longest sequence of the release, which its files do not specify."""


class FoundingPaper(Format):
    """ParallelHeads on a trunk without a final norm, as Gloeckle et al. 2024 (arXiv 2404.19737) released them.

    Head 1 is the last of ``layers``; the others are ``extra_heads``; ``n_layers`` counts both. The release rotates
    pairs of adjacent channels (interleaved RoPE). Our layers rotate channels half a head apart, so the rows of queries
    and keys are permuted.
    """

    name = "founding_paper"
    keeps_trunk = True
    takes: ClassVar[Takes] = {
        "concatenation": ("none",),
        "trunk_state": ("before_norm",),
        "chain_state": ("none",),
        "position_0": ("none",),
    }

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        _parallel_heads(model)
        state = "after_norm" if hasattr(model.trunk, "norm") and hasattr(model.trunk.norm, "weight") else "before_norm"
        return Conventions(concatenation="none", trunk_state=state, chain_state="none", position_0="none")

    def trunk(self, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return embedding and layers; the heads return ``params.json``."""
        trunk = transformer_trunk(self.name, model)
        written = {"tok_embeddings.weight": trunk.embedding.weight, "output.weight": model.unembedding.weight}
        for index, layer in enumerate(trunk.layers):
            written |= _write_layer(layer, f"layers.{index}.")
        return written, {}

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the heads' layers and the whole of ``params.json``."""
        trunk, heads = transformer_trunk(self.name, model), _parallel_heads(model)
        shape = shape_of(heads.layers[0])
        eps, base = heads.norm.eps, heads.rotary.base
        for layer in trunk.layers:
            if shape_of(layer) != shape or layer.attention_norm.eps != eps or trunk.rotary.base != base:
                refuse(
                    self.name,
                    "layers of trunk and heads have one shape in this format; give both the same num_heads, "
                    "num_kv_heads, ffn_width, rope_base, norm_eps, and qk_norm=False.",
                )
        written = {"norm.weight": heads.norm.weight.detach()}
        for index, layer in enumerate(heads.layers):
            prefix = f"extra_heads.{index - 1}." if index else f"layers.{len(trunk.layers)}."
            written |= _write_layer(layer, prefix)
        params = {
            "dim": shape.d_model,
            "n_layers": len(trunk.layers) + len(heads.layers),
            "n_heads": shape.num_heads,
            "n_kv_heads": shape.num_kv_heads,
            "vocab_size": trunk.vocab_size,
            "norm_eps": eps,
            "n_future_tokens": len(heads.layers),
        } | _inner_width(shape.d_model, shape.ffn_width)
        return written, params if base == 10000.0 else params | {"rope_theta": base}

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        if wanted.trunk is not None:
            refuse(self.name, "head 1 is a layer of the trunk in this format; omit trunk.")
        horizons = field(self.name, config, "n_future_tokens", 1)
        depth, width = field(self.name, config, "n_layers") - horizons, field(self.name, config, "dim")
        num_heads, positions = field(self.name, config, "n_heads"), wanted.max_positions or _POSITIONS
        if depth < 1:
            refuse(self.name, f"n_layers includes the heads, so it must be above n_future_tokens ({horizons}).")
        tensors.drop("rope.")
        embedding = tensors.take("tok_embeddings.weight", tensors.rows("tok_embeddings.weight"), width)
        output = tensors.take("output.weight", len(embedding), width)
        ffn_width = tensors.rows("layers.0.feed_forward.w1.weight")
        options: dict[str, Any] = {
            "d_model": width,
            "num_heads": num_heads,
            "num_kv_heads": field(self.name, config, "n_kv_heads", num_heads),
            "ffn_width": ffn_width,
            "max_positions": positions,
            "rope_base": field(self.name, config, "rope_theta", 10000.0),
            "norm_eps": field(self.name, config, "norm_eps"),
        }
        trunk = TransformerTrunk(vocab_size=len(embedding), num_layers=depth, final_norm=False, **options)
        heads = ParallelHeads(num_horizons=horizons, **options)
        state = {"trunk.embedding.weight": embedding, "unembedding.weight": output}
        state["heads.norm.weight"] = tensors.take("norm.weight", width)
        for index in range(depth + horizons):
            ours = f"trunk.layers.{index}." if index < depth else f"heads.layers.{index - depth}."
            prefix = f"layers.{index}." if index <= depth else f"extra_heads.{index - depth - 1}."
            layer = trunk.layers[index] if index < depth else heads.layers[index - depth]
            state |= {f"{ours}{name}": value for name, value in _read_layer(tensors, prefix, layer).items()}
        return fill(trunk, heads, state, tie_embeddings=False)

    def store(self, folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Write the files."""
        files.write_pickle(folder / WEIGHTS, tensors)
        files.write_json(folder / PARAMS, config)

    def open(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the files."""
        config = files.read_json(self.name, folder / PARAMS)
        return files.read_pickle(self.name, folder / WEIGHTS), config


def _parallel_heads(model: MTPModel) -> ParallelHeads:
    heads, owner = model.heads, FoundingPaper.name
    if not isinstance(heads, ParallelHeads):
        refuse(owner, f"the format stores ParallelHeads, the model has {type(heads).__name__}; see docs/interop.md.")
    if len(model.unembedding.own_weights):
        refuse(owner, "heads of this format share the output matrix; train with own_unembeddings=False.")
    return heads


def _inner_width(width: int, ffn_width: int) -> dict[str, Any]:
    """Return the settings from which Llama computes this feed-forward width."""
    usual = int(8 * width / 3)
    if ffn_width >= usual:
        return {"multiple_of": ffn_width}
    return {"multiple_of": 1, "ffn_dim_multiplier": (ffn_width + 0.5) / usual}


def _interleave(rows: Float[Tensor, "R D"], head_dim: int) -> Float[Tensor, "R D"]:
    """Permute rows so that the two rows of a rotated pair, half a head apart, become adjacent."""
    return torch.unflatten(rows, 0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _deinterleave(rows: Float[Tensor, "R D"], head_dim: int) -> Float[Tensor, "R D"]:
    """Undo :func:`_interleave`."""
    return torch.unflatten(rows, 0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _write_layer(layer: TransformerLayer, prefix: str) -> dict[str, Tensor]:
    queries, keys, values = split_qkv(layer.attention)
    gate, up = split_gate_up(layer.ffn)
    head_dim = layer.attention.head_dim
    return {
        f"{prefix}attention.wq.weight": _interleave(queries, head_dim),
        f"{prefix}attention.wk.weight": _interleave(keys, head_dim),
        f"{prefix}attention.wv.weight": values,
        f"{prefix}attention.wo.weight": layer.attention.out.weight,
        f"{prefix}feed_forward.w1.weight": gate,
        f"{prefix}feed_forward.w2.weight": layer.ffn.down.weight,
        f"{prefix}feed_forward.w3.weight": up,
        f"{prefix}attention_norm.weight": layer.attention_norm.weight,
        f"{prefix}ffn_norm.weight": layer.ffn_norm.weight,
    }


def _read_layer(tensors: Tensors, prefix: str, layer: TransformerLayer) -> dict[str, Tensor]:
    shape = shape_of(layer)
    width, head_dim, num_keys = shape.d_model, shape.head_dim, shape.num_kv_heads * shape.head_dim
    queries = tensors.take(f"{prefix}attention.wq.weight", width, width)
    keys = tensors.take(f"{prefix}attention.wk.weight", num_keys, width)
    values = tensors.take(f"{prefix}attention.wv.weight", num_keys, width)
    gate = tensors.take(f"{prefix}feed_forward.w1.weight", shape.ffn_width, width)
    up = tensors.take(f"{prefix}feed_forward.w3.weight", shape.ffn_width, width)
    return {
        "attention.qkv.weight": join_qkv(
            _deinterleave(queries, head_dim), _deinterleave(keys, head_dim), values, head_dim
        ),
        "attention.out.weight": tensors.take(f"{prefix}attention.wo.weight", width, width),
        "ffn.gate_up.weight": join_gate_up(gate, up),
        "ffn.down.weight": tensors.take(f"{prefix}feed_forward.w2.weight", width, shape.ffn_width),
        "attention_norm.weight": tensors.take(f"{prefix}attention_norm.weight", width),
        "ffn_norm.weight": tensors.take(f"{prefix}ffn_norm.weight", width),
    }
