"""What drafters that read inner layers of the trunk share: EAGLE-3, DFlash and DSpark, as vLLM 0.32 reads them.

Such a drafter has a folder of its own. It shares the embedding and the output matrix of the model that it drafts for,
unless its folder has others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.interop.layers import LayerShape
from mtp_modules.interop.tensors import Tensors
from mtp_modules.layers.transformer import RMSNorm
from mtp_modules.model import MTPModel


def flat(config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return a configuration with all entries at the top, also if speculators wrote it.

    speculators keeps the sizes of the layers in ``transformer_layer_config``, and names layers of the trunk by how many
    layers come before the state that is read.

    Args:
        config: Content of ``config.json``.
        defaults: Entries that speculators may leave out, where their defaults are not those of other files.
    """
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict):
        return dict(config)
    found = {**layer, **defaults, **{name: value for name, value in config.items() if value is not None}}
    if found.get("aux_hidden_state_layer_ids"):
        found["eagle_aux_hidden_state_layer_ids"] = found["aux_hidden_state_layer_ids"]
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return found | {"speculative_tokens": methods[0].get("speculative_tokens")}


def drafter_config(
    model: MTPModel, shape: LayerShape, norm: RMSNorm, *, num_layers: int, max_positions: int, rope_base: float
) -> dict[str, Any]:
    """Return the sizes of a drafter's layers, and the layers of the trunk that it reads.

    Args:
        model: The model that owns the heads.
        shape: Sizes of the layers.
        norm: Any of their norms.
        num_layers: Number of layers.
        max_positions: Longest sequence.
        rope_base: Base of the rotary embeddings.
    """
    return {
        "vocab_size": model.trunk.vocab_size,
        "hidden_size": shape.d_model,
        "target_hidden_size": model.trunk.d_model,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": norm.eps,
        "rope_theta": rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_base},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": str(norm.weight.dtype).removeprefix("torch."),
        "num_aux_hidden_states": len(model.trunk.feature_layers),
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in model.trunk.feature_layers],
    }


def check_fits(owner: str, model: MTPModel, embedding_width: int) -> None:
    """Reject heads whose sizes a drafter cannot have.

    Args:
        owner: Name of the format.
        model: The model that owns the heads.
        embedding_width: Width of the embedding that the heads read.

    Raises:
        ValueError: If there is nothing to write, embeddings have another width than states or are not the rows of a
            matrix, or horizons have more than one output matrix.
    """
    if len(model.horizons) < 2:
        refuse(owner, "the heads have no horizon beyond the first, so there is nothing to write.")
    if embedding_width != model.trunk.d_model:
        refuse(owner, f"embeddings must be as wide as hidden states ({model.trunk.d_model}), got {embedding_width}.")
    embedding = model.trunk.embedding
    weight = cast("Tensor", embedding.weight)
    with torch.no_grad():  # the padding token's row may be zero, and any other
        tokens = torch.linspace(0, len(weight) - 1, 64, device=weight.device).long()
        same = torch.equal(embedding(tokens), weight[tokens])
    if not same:
        refuse(
            owner,
            f"drafters of this format read rows of the embedding, and the trunk's {type(embedding).__name__} changes "
            "them; use another format.",
        )
    if (count := len(model.unembedding.own_weights)) > 1:
        refuse(
            owner,
            f"all drafts of this format share one output matrix, and own_unembeddings made {count}; train with "
            "own_unembeddings=False.",
        )


def write_outputs(model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the output matrix of the drafts, unless it is the model's, and the tokens that it scores.

    Args:
        model: A model whose horizons beyond the first share one output matrix.
    """
    unembedding, vocab = model.unembedding, model.trunk.vocab_size
    entries = {"draft_vocab_size": vocab, "has_own_lm_head": len(unembedding.own_weights) > 0}
    if not len(unembedding.own_weights):
        return {}, entries
    written: dict[str, Tensor] = {"lm_head.weight": unembedding.own_weights[0]}
    tokens = unembedding.draft_tokens
    if tokens is None or len(tokens) == vocab:
        return written, entries
    scored = torch.zeros(vocab, dtype=torch.bool, device=tokens.device)
    scored[tokens] = True
    offsets = tokens - torch.arange(len(tokens), device=tokens.device)
    return written | {"d2t": offsets, "t2d": scored}, entries | {"draft_vocab_size": len(tokens)}


def read_outputs(tensors: Tensors, config: Mapping[str, Any], base: MTPModel) -> tuple[dict[str, Tensor], int | None]:
    """Take the output matrix of the drafts, if the checkpoint has its own, and the tokens that it scores.

    Args:
        tensors: Tensors of the checkpoint.
        config: Its configuration.
        base: The model that the drafter belongs to.

    Returns:
        The tensors under the names of an :class:`~mtp_modules.MTPModel`, and its ``num_draft_tokens``.

    Raises:
        ValueError: If the matrix of a part of the vocabulary is missing, or its tokens are.
    """
    owner, vocab = tensors.owner, base.trunk.vocab_size
    rows = config.get("draft_vocab_size") or vocab
    if rows == vocab and "lm_head.weight" not in tensors and not config.get("has_own_lm_head"):
        return {}, None
    weight = tensors.take("lm_head.weight", rows, base.trunk.d_model)
    tokens = torch.arange(rows)
    if rows != vocab or "d2t" in tensors:
        tokens = tokens + tensors.take("d2t", rows)
    ids: Int[Tensor, " S"] = tokens
    if bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= vocab:
        refuse(owner, f"d2t must map to ascending tokens in 0..{vocab - 1}; the checkpoint is of another model.")
    if "t2d" in tensors:
        scored = torch.zeros(vocab, dtype=torch.bool)
        scored[ids] = True
        if not torch.equal(tensors.take("t2d", vocab).bool(), scored):
            refuse(owner, "t2d and d2t disagree about the tokens of drafts; restore the one that was edited.")
    return {"unembedding.draft_tokens": ids, "unembedding.own_weights.0": weight}, rows


def read_layers(config: Mapping[str, Any], target_layers: Sequence[int] | None, base: MTPModel) -> list[int]:
    """Return the layers of the trunk that a drafter reads, counted from 0.

    Args:
        config: Configuration of the drafter.
        target_layers: The layers where the drafter has its own entry for them.
        base: The model that the drafter belongs to, for the layers that vLLM takes if nothing names them.
    """
    eagle, block = config.get("eagle_config") or {}, config.get("dflash_config") or {}
    given = config.get("eagle_aux_hidden_state_layer_ids") or eagle.get("eagle_aux_hidden_state_layer_ids")
    target_layers = target_layers or config.get("dspark_target_layer_ids")
    if not given and target_layers:
        return sorted(target_layers)
    count = len(base.trunk.blocks)
    given = given or block.get("layer_ids") or eagle.get("layer_ids") or (2, count // 2, count - 3)
    return sorted(layer - 1 for layer in given)


def read_embedding(tensors: Tensors, rows: int, base: MTPModel) -> Float[Tensor, "R D"]:
    """Take the embedding of a drafter, or return that of the model that it belongs to.

    Args:
        tensors: Tensors of the checkpoint.
        rows: Number of rows in the configuration.
        base: The model that the drafter belongs to.

    Raises:
        ValueError: If the drafter's embedding begins otherwise than that of the model.
    """
    owner, ours = tensors.owner, base.trunk.embedding.weight
    assert isinstance(ours, Tensor)
    name = "embed_tokens.weight"
    if name not in tensors:
        if rows != len(ours):
            refuse(
                owner,
                f"{name} is missing, and vocab_size is {rows} here and {len(ours)} in the model given as trunk; give "
                "the model that the heads belong to, or all files of the checkpoint.",
            )
        return ours
    table = tensors.take(name, rows, ours.shape[1])
    narrow = min(table.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)  # the model may have another precision
    if not torch.equal(table[: len(ours)].to(narrow), ours.to(narrow)):
        refuse(
            owner,
            f"{name} is not the embedding of the model given as trunk, which our heads read; give the model that the "
            "heads belong to.",
        )
    return table


def refuse_entries(owner: str, config: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Reject a configuration with options that our heads do not have.

    Args:
        owner: Name of the format.
        config: Configuration of the drafter.
        ours: The value of each entry that our heads compute with.

    Raises:
        ValueError: If an entry has another value.
    """
    for name, value in ours.items():
        if (found := config.get(name)) is not None and found != value:
            refuse(owner, f"config.json has {name}={found}, our heads have {value}; this drafter cannot be read.")


def row_of(table: nn.Embedding, vector: Float[Tensor, " D"]) -> int | None:
    """Return the first row of an embedding that equals a vector; ``None`` if none does.

    Args:
        table: The embedding.
        vector: The vector.
    """
    found = (table.weight == vector).all(dim=1).nonzero()
    return int(found[0, 0]) if len(found) else None
