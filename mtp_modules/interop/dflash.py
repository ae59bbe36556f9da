"""DFlash: a block of masks over fused features, under the names of its released checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Heads
from mtp_modules.core.shapes import Tensor
from mtp_modules.heads import ContextBlockHeads
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.drafters import (
    check_fits,
    drafter_config,
    flat,
    read_embedding,
    read_layers,
    read_outputs,
    refuse_entries,
    row_of,
    write_outputs,
)
from mtp_modules.interop.format import Format, Wanted, attach_heads, needed_base
from mtp_modules.interop.layers import LayerStyle, read_layer, shape_of, write_layer
from mtp_modules.interop.serving import Exported
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import read_sizes
from mtp_modules.model import MTPModel

_STYLE = LayerStyle(qk_norm=True)
_MASK_FILE = "mask_embedding.pt"
_OURS = {
    "use_aux_hidden_state": True,
    "use_swa": False,
    "attention_sink_bias": False,
    "add_swa_attention_sink_bias": False,
    "attention_value_scale": 1.0,
    "is_neox_style": True,
    "logit_scale": 1.0,
}
_GAINS = (
    "vLLM 0.32 on a CPU normalises the context's keys in all layers with the gains of the first, so drafts may be "
    "accepted less often there; the output is the same: train with num_layers=1 to serve on a CPU."
)
TAKES: Takes = {
    "concatenation": ("none",),
    "trunk_state": ("before_norm",),
    "chain_state": ("none",),
    "position_0": ("none",),
    "anchor": ("given",),
    "block_attention": ("bidirectional", "causal"),
}


class Block(NamedTuple):
    """What a checkpoint says of a block drafter.

    Attributes:
        heads: Heads whose weights are still to be loaded.
        state: Their tensors, named from the heads on.
        outputs: Output matrix of the drafts, and their tokens.
        num_draft_tokens: How many tokens the drafts have; ``None`` if they share the model's output matrix.
        layers: Layers of the trunk that they read.
        vocab_size: Rows of the drafter's embedding.
    """

    heads: ContextBlockHeads
    state: dict[str, Tensor]
    outputs: dict[str, Tensor]
    num_draft_tokens: int | None
    layers: list[int]
    vocab_size: int


def block_heads(owner: str, model: MTPModel, heads: Heads) -> ContextBlockHeads:
    """Return the heads if they are DFlash's.

    Args:
        owner: Name of the format.
        model: The model that owns the heads.
        heads: The heads, without others around them.

    Raises:
        ValueError: If the heads are of another class, or have a part that the format cannot store.
    """
    if not isinstance(heads, ContextBlockHeads):
        refuse(
            owner, f"the format stores ContextBlockHeads, the model has {type(heads).__name__}; see docs/interop.md."
        )
    check_fits(owner, model, heads.embedding_width)
    if heads.layers[0].layer.attention.query_norm is None:
        refuse(owner, "layers of this format normalise queries and keys; train heads with qk_norm=True.")
    return heads


def block_conventions(heads: ContextBlockHeads) -> Conventions:
    """Return the conventions of these heads.

    Args:
        heads: The heads.
    """
    return Conventions(
        concatenation="none",
        trunk_state="before_norm",
        chain_state="none",
        position_0="none",
        anchor="predicts" if heads.sample_from_anchor else "given",
        block_attention="causal" if heads.causal else "bidirectional",
    )


def stated_conventions(config: Mapping[str, Any], *, from_anchor: bool) -> dict[str, str]:
    """Return the conventions that the configuration of a block drafter states.

    Args:
        config: The configuration, flat.
        from_anchor: Whether the anchor predicts where nothing is said.
    """
    causal = config.get("is_causal")
    causal = _entry(config, "causal") if causal is None else causal
    anchor = _entry(config, "sample_from_anchor")
    return {
        "anchor": "predicts" if (from_anchor if anchor is None else anchor) else "given",
        "block_attention": "causal" if causal else "bidirectional",
    }


def _entry(config: Mapping[str, Any], name: str) -> Any:
    """Return an entry of a block drafter, from where vLLM looks first."""
    return (config.get("dflash_config") or {}).get(name, config.get(name))


def write_block(owner: str, model: MTPModel, heads: ContextBlockHeads) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the configuration of a block drafter.

    The embedding of the mask is a row of the embedding. If no token has that embedding, the drafter gets a copy of the
    embedding with one more row.

    Args:
        owner: Name of the format.
        model: The model that owns the heads.
        heads: The heads.
    """
    written = {
        "fc.weight": heads.fuse.weight,
        "hidden_norm.weight": heads.context_norm.weight,
        "norm.weight": heads.norm.weight,
    }
    for index, layer in enumerate(heads.layers):
        written |= write_layer(owner, layer.layer, f"layers.{index}.", _STYLE)
    outputs, entries = write_outputs(model)
    sizes = drafter_config(
        model,
        shape_of(heads.layers[0].layer),
        heads.norm,
        num_layers=len(heads.layers),
        max_positions=heads.max_positions,
        rope_base=heads.rotary.base,
    )
    embedding, vocab = model.trunk.embedding, model.trunk.vocab_size
    assert isinstance(embedding, torch.nn.Embedding)
    mask = row_of(embedding, heads.mask)
    if mask is None:
        mask, sizes["vocab_size"] = vocab, vocab + 1
        written["embed_tokens.weight"] = torch.cat((embedding.weight, heads.mask[None].to(embedding.weight)))
    block = {
        "mask_token_id": mask,
        "target_layer_ids": list(model.trunk.feature_layers),
        "sample_from_anchor": heads.sample_from_anchor,
        "causal": heads.causal,
    }
    return written | outputs, sizes | entries | {
        "model_type": "qwen3",
        "block_size": heads.num_slots,
        "dflash_config": block,
    }


def read_block(tensors: Tensors, config: Mapping[str, Any], wanted: Wanted, base: MTPModel) -> Block:
    """Take the tensors of a block drafter.

    Args:
        tensors: Tensors of the checkpoint.
        config: Its configuration, flat.
        wanted: Conventions and number of horizons.
        base: The model that the drafter belongs to.

    Raises:
        ValueError: If a tensor is missing, or if the drafter has a part that our heads do not have.
    """
    owner, block = tensors.owner, config.get("dflash_config") or {}
    refuse_entries(owner, {**config, **block}, _OURS)
    sizes = read_sizes(owner, config, qk_norm=True, any_head_dim=True)
    width, shape = base.trunk.d_model, sizes.layer
    layers = read_layers(config, _entry(config, "target_layer_ids"), base)
    from_anchor = wanted.conventions.anchor == "predicts"
    slots, drafts = _entry(config, "block_size"), config.get("speculative_tokens")
    horizons = wanted.num_horizons or (slots + from_anchor if slots else drafts + 1 if drafts else None)
    if horizons is None:
        refuse(owner, "config.json has no block_size; give num_horizons, one more than the tokens that are drafted.")
    heads = ContextBlockHeads(
        d_model=shape.d_model,
        num_horizons=horizons,
        num_heads=shape.num_heads,
        num_features=len(layers),
        num_layers=sizes.num_layers,
        num_kv_heads=shape.num_kv_heads,
        ffn_width=shape.ffn_width,
        max_positions=max(sizes.max_positions, base.trunk.max_positions or 0),
        rope_base=sizes.rope_base,
        norm_eps=sizes.norm_eps,
        head_dim=None if shape.head_dim * shape.num_heads == shape.d_model else shape.head_dim,
        causal=wanted.conventions.block_attention == "causal",
        sample_from_anchor=from_anchor,
    )
    mask = _entry(config, "mask_token_id")
    if not isinstance(mask, int) or not 0 <= mask < sizes.vocab_size:
        refuse(owner, f"mask_token_id must lie in 0..{sizes.vocab_size - 1}, the drafter's vocab_size, got {mask}.")
    state = {
        "mask": read_embedding(tensors, sizes.vocab_size, base)[mask],
        "fuse.weight": tensors.take("fc.weight", width, len(layers) * width),
        "context_norm.weight": tensors.take("hidden_norm.weight", width),
        "norm.weight": tensors.take("norm.weight", width),
    }
    for index in range(sizes.num_layers):
        layer = read_layer(tensors, f"layers.{index}.", _STYLE, shape)
        state |= {f"layers.{index}.layer.{name}": value for name, value in layer.items()}
    outputs, num_draft_tokens = read_outputs(tensors, config, base)
    return Block(heads, state, outputs, num_draft_tokens, layers, sizes.vocab_size)


def refuse_mask_file(owner: str, folder: Path) -> None:
    """Reject a checkpoint whose mask lies in a pickle of its own.

    Args:
        owner: Name of the format.
        folder: Folder of the checkpoint.

    Raises:
        ValueError: If the pickle exists.
    """
    if (folder / _MASK_FILE).exists():
        refuse(
            owner,
            f"{folder} has {_MASK_FILE}, a pickle that replaces the embedding of the mask; write it to that row of "
            "embed_tokens.weight in model.safetensors, and delete it.",
        )


class DFlash(Format):
    """ContextBlockHeads as a drafter of DFlash, with layers of Qwen3.

    The embedding of the mask is a row of the drafter's embedding. Where no token of the trunk has it, the folder gets
    its own ``embed_tokens.weight``, of one more row. Files of speculators are read too. Chen et al. 2026 (arXiv
    2602.06036).
    """

    name = "dflash"
    keeps_trunk = False
    draft_vocabulary = True
    method = "dflash"
    takes: ClassVar[Takes] = TAKES

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        return block_conventions(block_heads(self.name, model, model.heads))

    def stated(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return what the configuration says of the anchor and of attention in a block."""
        return stated_conventions(flat(config), from_anchor=False)

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the layers, the fusing matrix and the norms."""
        written, entries = write_block(self.name, model, block_heads(self.name, model, model.heads))
        return written, entries | {"architectures": ["DFlashDraftModel"]}

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        base = needed_base(self.name, wanted.trunk)
        found = read_block(tensors, flat(config), wanted, base)
        state = found.outputs | {f"heads.{name}": value for name, value in found.state.items()}
        return attach_heads(
            self.name,
            base,
            found.heads,
            state,
            num_draft_tokens=found.num_draft_tokens,
            feature_layers=found.layers,
        )

    def serving(self, model: MTPModel, folder: Path, *, has_tokenizer: bool) -> Exported:
        """Return how vLLM serves the folder, and what its build for CPUs computes otherwise."""
        exported = super().serving(model, folder, has_tokenizer=has_tokenizer)
        if exported.command is None or len(block_heads(self.name, model, model.heads).layers) == 1:
            return exported
        return exported._replace(notes=(*exported.notes, _GAINS))

    def open(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the files."""
        refuse_mask_file(self.name, folder)
        return super().open(folder)
