"""Trunks under the tensor names of Hugging Face transformers, and their configurations."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.interop.layers import LayerShape, LayerStyle, read_layer, read_norm, shape_of, write_layer, write_norm
from mtp_modules.interop.tensors import Tensors
from mtp_modules.model import MTPModel
from mtp_modules.trunks import TransformerTrunk

_MISSING = object()


@runtime_checkable
class NamedTrunk(Protocol):
    """A trunk that wraps a transformers model and knows its tensor names and configuration."""

    def foreign_state(self) -> dict[str, Tensor]:
        """Return the tensors under their names in transformers, ``model.layers.0...``, without an output matrix."""
        ...

    def foreign_config(self) -> dict[str, Any]:
        """Return the configuration as it stands in ``config.json``."""
        ...


class Sizes(NamedTuple):
    """The sizes that heads and trunk of one ``config.json`` share.

    Attributes:
        layer: Sizes of every layer.
        num_layers: Number of layers of the trunk.
        vocab_size: Number ``V`` of token ids.
        max_positions: Longest sequence.
        rope_base: Base of the rotary embeddings.
        norm_eps: Epsilon of every norm.
        tied: Whether output matrix and embedding are tied.
    """

    layer: LayerShape
    num_layers: int
    vocab_size: int
    max_positions: int
    rope_base: float
    norm_eps: float
    tied: bool


_COUNTS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
    *("num_hidden_layers", "vocab_size", "max_position_embeddings", "sliding_window", "markov_rank"),
)


def field(owner: str, config: Mapping[str, Any], name: str, default: Any = _MISSING) -> Any:
    """Return an entry of a configuration.

    Args:
        owner: Name of the format.
        config: Content of ``config.json``.
        name: Name of the entry.
        default: Returned if the entry is missing or null; without a default, that is an error.

    Raises:
        ValueError: If the entry is missing and no default is given.
    """
    value = config.get(name)
    if value is None and default is _MISSING:
        refuse(owner, f"config.json has no {name}; give the folder of a complete checkpoint.")
    if name in _COUNTS and value is not None and not (type(value) is int and 0 < value < 2**31):
        refuse(owner, f"config.json has {name}={value!r}, which must be a whole number above 0; restore it.")
    return default if value is None else value


def read_sizes(
    owner: str, config: Mapping[str, Any], *, qk_norm: bool, rotary_fraction: float = 1.0, any_head_dim: bool = False
) -> Sizes:
    """Read the sizes of a transformers model, and reject what our layers cannot represent.

    Args:
        owner: Name of the format.
        config: Content of ``config.json``.
        qk_norm: Whether its layers normalise queries and keys.
        rotary_fraction: Default of ``partial_rotary_factor``, the fraction of channels that are rotated.
        any_head_dim: Whether an attention head may have another width than ``hidden_size / num_attention_heads``. Not
            supported for formats whose prediction heads have attention.

    Raises:
        ValueError: If a size is missing, or our layers do not support its value.
    """
    width, heads = field(owner, config, "hidden_size"), field(owner, config, "num_attention_heads")
    rope = field(owner, config, "rope_parameters", None) or field(owner, config, "rope_scaling", None) or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", rotary_fraction))
    types = set(field(owner, config, "layer_types", ["full_attention"]))
    head_dim = field(owner, config, "head_dim", width // heads)
    for name, value, ours in (
        ("head_dim", head_dim, head_dim if any_head_dim else width // heads),
        ("partial_rotary_factor", partial, 1.0),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("hidden_act", field(owner, config, "hidden_act", "silu"), "silu"),
        ("layer_types", "/".join(sorted(types)), "full_attention"),
    ):
        if value != ours:
            refuse(owner, f"config.json has {name}={value}, our layers have {ours}; this model cannot be read.")
    # What transformers takes where a file of these says nothing.
    defaults = (10000.0, 1e-6) if config.get("model_type") in ("llama", "qwen2", "qwen3") else ()
    max_positions = field(owner, config, "max_position_embeddings")
    window = field(owner, config, "sliding_window", None) if config.get("use_sliding_window", True) else None
    if window is not None and window < max_positions:
        refuse(
            owner,
            f"config.json has sliding_window={window}, our layers attend to all max_positions={max_positions}; only a "
            "model whose window is at least max_positions can be read.",
        )
    return Sizes(
        layer=LayerShape(
            width,
            heads,
            field(owner, config, "num_key_value_heads", heads),
            field(owner, config, "intermediate_size"),
            qk_norm,
            head_dim,
        ),
        num_layers=field(owner, config, "num_hidden_layers"),
        vocab_size=field(owner, config, "vocab_size"),
        max_positions=max_positions,
        rope_base=rope.get("rope_theta") or field(owner, config, "rope_theta", *defaults[:1]),
        norm_eps=field(owner, config, "rms_norm_eps", *defaults[1:]),
        tied=field(owner, config, "tie_word_embeddings", False),
    )


def transformer_trunk(owner: str, model: MTPModel, *, any_head_dim: bool = False) -> TransformerTrunk:
    """Return the trunk if a transformers model can represent it.

    Args:
        owner: Name of the format.
        model: The model that owns the trunk.
        any_head_dim: Whether an attention head may have another width than ``d_model / num_heads``.

    Raises:
        ValueError: If the trunk is of another class, or has a part that the format cannot store.
    """
    trunk = model.trunk
    if not isinstance(trunk, TransformerTrunk):
        refuse(owner, f"the format also stores the trunk, and has no names for a {type(trunk).__name__}.")
    if trunk.num_previous:
        refuse(owner, f"the format has no embeddings of previous tokens, and num_previous is {trunk.num_previous}.")
    shape = shape_of(trunk.layers[0])
    if not any_head_dim and shape.head_dim * shape.num_heads != trunk.d_model:
        refuse(owner, f"the format requires head_dim = d_model / num_heads, and head_dim is {shape.head_dim}.")
    return trunk


def trunk_config(owner: str, model: MTPModel, style: LayerStyle, *, any_head_dim: bool = False) -> dict[str, Any]:
    """Return the trunk's entries of ``config.json``.

    Args:
        owner: Name of the format.
        model: The model that owns the trunk.
        style: Layer style of the format.
        any_head_dim: Whether an attention head may have another width than ``d_model / num_heads``.

    Raises:
        ValueError: If the format cannot represent the trunk.
    """
    trunk = transformer_trunk(owner, model, any_head_dim=any_head_dim)
    first = trunk.layers[0]
    shape = shape_of(first)
    if not hasattr(trunk.norm, "eps"):
        refuse(owner, "heads of this format read the hidden states after the final norm; build with final_norm=True.")
    if style.qk_norm is not None and shape.qk_norm != style.qk_norm:
        refuse(owner, f"layers of this format have qk_norm={style.qk_norm}, the trunk has qk_norm={shape.qk_norm}.")
    base = trunk.rotary.base
    return {
        "vocab_size": trunk.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": len(trunk.layers),
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": trunk.max_positions,
        "rms_norm_eps": first.attention_norm.eps,
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "hidden_act": "silu",
        "attention_bias": style.bias,
        "tie_word_embeddings": model.unembedding.tied,
        "dtype": str(trunk.embedding.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def write_trunk(owner: str, model: MTPModel, style: LayerStyle, *, last: LayerStyle | None = None) -> dict[str, Tensor]:
    """Return the tensors of trunk and output matrix under their names in transformers.

    Args:
        owner: Name of the format.
        model: The model that owns the trunk.
        style: Layer style of the format.
        last: Style of the last layer; ``style`` if ``None``.
    """
    if isinstance(model.trunk, NamedTrunk):
        written = model.trunk.foreign_state()
    else:
        trunk = transformer_trunk(owner, model, any_head_dim=True)  # a format that minds has looked at it
        written = {"model.embed_tokens.weight": trunk.embedding.weight}
        for index, layer in enumerate(trunk.layers):
            own = last if last is not None and index == len(trunk.layers) - 1 else style
            written |= write_layer(owner, layer, f"model.layers.{index}.", own)
        written["model.norm.weight"] = write_norm(owner, "model.norm.weight", trunk.norm, style)
    if not model.unembedding.tied:
        written["lm_head.weight"] = model.unembedding.weight
    return written


def read_trunk(
    tensors: Tensors,
    sizes: Sizes,
    style: LayerStyle,
    *,
    feature_layers: Sequence[int] = (),
    last: LayerStyle | None = None,
) -> tuple[TransformerTrunk, dict[str, Tensor]]:
    """Take the tensors of trunk and output matrix.

    Args:
        tensors: Tensors of the checkpoint.
        sizes: Sizes of the model.
        style: Layer style of the format.
        feature_layers: Layers whose outputs the trunk also returns.
        last: Style of the last layer; ``style`` if ``None``.

    Returns:
        A trunk whose weights are still to be loaded, and the state dict of trunk and output matrix under the names of
        an :class:`~mtp_modules.MTPModel`.

    Raises:
        ValueError: If a tensor is missing, or if the trunk has a part that ours does not have.
    """
    width, layer = sizes.layer.d_model, sizes.layer
    trunk = TransformerTrunk(
        vocab_size=sizes.vocab_size,
        d_model=width,
        num_layers=sizes.num_layers,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        ffn_width=layer.ffn_width,
        max_positions=sizes.max_positions,
        rope_base=sizes.rope_base,
        qk_norm=layer.qk_norm,
        norm_eps=sizes.norm_eps,
        head_dim=layer.head_dim,
        feature_layers=feature_layers,
    )
    embedding = tensors.take("model.embed_tokens.weight", sizes.vocab_size, width)
    state = {"trunk.embedding.weight": embedding}
    for index in range(sizes.num_layers):
        own = last if last is not None and index == sizes.num_layers - 1 else style
        read = read_layer(tensors, f"model.layers.{index}.", own, layer)
        state |= {f"trunk.layers.{index}.{name}": value for name, value in read.items()}
    state["trunk.norm.weight"] = read_norm(tensors, "model.norm.weight", width, style)
    if sizes.tied:
        tensors.same("lm_head.weight", embedding, "model.embed_tokens.weight, because tie_word_embeddings is true")
    output = embedding if sizes.tied else tensors.take("lm_head.weight", sizes.vocab_size, width)
    return trunk, state | {"unembedding.weight": output}
