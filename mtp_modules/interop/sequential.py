"""Sequential heads under the names of several formats, which differ in little else."""

from collections.abc import Callable
from typing import NamedTuple

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.heads import SequentialHeads
from mtp_modules.interop.conventions import Conventions
from mtp_modules.interop.layers import LayerShape, LayerStyle, read_layer, read_norm, shape_of, write_layer, write_norm
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import Sizes
from mtp_modules.model import MTPModel


class ModuleNames(NamedTuple):
    """The tensor names of one module.

    Attributes:
        token_norm: Norm of the embedding.
        state_norm: Norm of the hidden state.
        merge: Matrix that merges embedding and hidden state.
        out_norm: Output norm of the module.
        layer: Prefix of the transformer layer's tensors.
    """

    token_norm: str
    state_norm: str
    merge: str
    out_norm: str
    layer: str


def sequential_heads(owner: str, model: MTPModel, *, max_modules: int | None = None) -> SequentialHeads:
    """Return the heads if they are chained modules, as the format stores them.

    Args:
        owner: Name of the format.
        model: The model that owns the heads.
        max_modules: Largest number of modules that the format stores.

    Raises:
        ValueError: If the heads are of another class, or have a part that the format cannot store.
    """
    heads = model.heads
    if not isinstance(heads, SequentialHeads):
        refuse(owner, f"the format stores SequentialHeads, the model has {type(heads).__name__}; see docs/interop.md.")
    if heads.num_horizons < 2:
        refuse(owner, "the heads have no horizon beyond the first, so there is nothing to write.")
    if len(model.unembedding.own_weights):
        refuse(owner, "modules of this format share the output matrix; train with own_unembeddings=False.")
    if heads.embedding_width != heads.d_model:
        refuse(owner, f"embeddings must be as wide as hidden states ({heads.d_model}), got {heads.embedding_width}.")
    if max_modules is not None and len(heads.steps) > max_modules:
        refuse(
            owner,
            f"the format stores {max_modules} module, the heads have {len(heads.steps)}; "
            "train with shared=True, or with num_horizons=2.",
        )
    if len(heads.norms) < len(heads.steps):
        refuse(owner, "every module of this format has its own norm; train with shared_norm=False.")
    return heads


def conventions_of(heads: SequentialHeads) -> Conventions:
    """Return the conventions of these heads.

    Args:
        heads: Heads on a trunk that ends with a norm.
    """
    return Conventions(
        concatenation="embedding_first" if heads.steps[0].embedding_first else "state_first",
        trunk_state="after_norm",
        chain_state="after_norm" if heads.chain_norm else "before_norm",
        position_0="token",
    )


def check_sizes(owner: str, model: MTPModel, heads: SequentialHeads, sizes: Sizes, *, any_ffn: bool = False) -> None:
    """Reject heads that one configuration cannot describe together with the trunk.

    Args:
        owner: Name of the format.
        model: The model that owns the heads.
        heads: The heads to write.
        sizes: Sizes in the configuration.
        any_ffn: Whether modules may have another feed-forward width than the trunk's layers.

    Raises:
        ValueError: If a size differs.
    """
    shape = shape_of(heads.steps[0].layer)
    pairs: list[tuple[str, object, object]] = [
        ("vocab_size", model.trunk.vocab_size, sizes.vocab_size),
        ("d_model", shape.d_model, sizes.layer.d_model),
        ("num_heads", shape.num_heads, sizes.layer.num_heads),
        ("num_kv_heads", shape.num_kv_heads, sizes.layer.num_kv_heads),
        ("qk_norm", shape.qk_norm, sizes.layer.qk_norm),
        ("rope_base", heads.rotary.base, sizes.rope_base),
        ("norm_eps", heads.steps[0].state_norm.eps, sizes.norm_eps),
    ]
    if not any_ffn:
        pairs.append(("ffn_width", shape.ffn_width, sizes.layer.ffn_width))
    for name, found, wanted in pairs:
        if found != wanted:
            refuse(
                owner,
                f"one config.json describes trunk and heads, but {name} is {found} for the heads and "
                f"{wanted} for the trunk; train heads with the sizes of the trunk.",
            )


def write_modules(
    owner: str, heads: SequentialHeads, names: Callable[[int], ModuleNames], style: LayerStyle
) -> dict[str, Tensor]:
    """Return the tensors of all modules.

    Args:
        owner: Name of the format.
        heads: The heads to write.
        names: Returns the tensor names of a module, given its index.
        style: Layer style of the format.
    """
    written: dict[str, Tensor] = {}
    for index, step in enumerate(heads.steps):
        name = names(index)
        written[name.merge] = step.merge.weight
        for norm_name, norm in (
            (name.token_norm, step.token_norm),
            (name.state_norm, step.state_norm),
            (name.out_norm, heads.norms[index]),
        ):
            written[norm_name] = write_norm(owner, norm_name, norm, style)
        written |= write_layer(owner, step.layer, name.layer, style)
    return written


def read_modules(
    tensors: Tensors, names: Callable[[int], ModuleNames], count: int, style: LayerStyle, shape: LayerShape
) -> dict[str, Tensor]:
    """Take the tensors of all modules and return them under the names of an :class:`~mtp_modules.MTPModel`.

    Args:
        tensors: Tensors of the checkpoint.
        names: Returns the tensor names of a module, given its index.
        count: Number of modules.
        style: Layer style of the format.
        shape: Sizes of the modules' layers.
    """
    state: dict[str, Tensor] = {}
    for index in range(count):
        name, ours = names(index), f"heads.steps.{index}."
        state[f"{ours}merge.weight"] = tensors.take(name.merge, shape.d_model, 2 * shape.d_model)
        state[f"{ours}token_norm.weight"] = read_norm(tensors, name.token_norm, shape.d_model, style)
        state[f"{ours}state_norm.weight"] = read_norm(tensors, name.state_norm, shape.d_model, style)
        state[f"heads.norms.{index}.weight"] = read_norm(tensors, name.out_norm, shape.d_model, style)
        layer = read_layer(tensors, name.layer, style, shape)
        state |= {f"{ours}layer.{part}": value for part, value in layer.items()}
    return state


def build_heads(
    owner: str, sizes: Sizes, shape: LayerShape, conventions: Conventions, *, count: int, num_horizons: int | None
) -> SequentialHeads:
    """Build heads whose weights are still to be loaded.

    Args:
        owner: Name of the format.
        sizes: Sizes of the model.
        shape: Sizes of the modules' layers.
        conventions: Conventions of the heads.
        count: Number of modules.
        num_horizons: More than ``count + 1`` applies a single module to several horizons; ``None`` for ``count + 1``.

    Raises:
        ValueError: If our heads do not follow the conventions, or the modules are too few.
    """
    if conventions.position_0 == "zero":
        refuse(owner, "SequentialHeads read the token's embedding at position 0, the file has position_0=zero.")
    horizons = count + 1 if num_horizons is None else num_horizons
    if horizons < count + 1 or (horizons > count + 1 and count > 1):
        refuse(owner, f"num_horizons must be {count + 1} for {count} modules, got {horizons}.")
    return SequentialHeads(
        d_model=shape.d_model,
        num_horizons=horizons,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        ffn_width=shape.ffn_width,
        max_positions=sizes.max_positions,
        shared=horizons > count + 1,
        chain_norm=conventions.chain_state == "after_norm",
        embedding_first=conventions.concatenation == "embedding_first",
        rope_base=sizes.rope_base,
        qk_norm=shape.qk_norm,
        norm_eps=sizes.norm_eps,
    )
