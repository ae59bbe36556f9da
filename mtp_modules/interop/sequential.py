"""Sequential heads under the names of several formats, which differ in little but these."""

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
    """What the tensors of one module are called.

    Attributes:
        token_norm: Norm of the embedding.
        state_norm: Norm of the state.
        merge: Matrix that joins both.
        out_norm: Norm behind the module.
        layer: Prefix of the transformer layer's.
    """

    token_norm: str
    state_norm: str
    merge: str
    out_norm: str
    layer: str


def sequential_heads(owner: str, model: MTPModel, *, most_modules: int | None = None) -> SequentialHeads:
    """Return the heads, if they are those of a format that keeps modules one behind the other.

    Args:
        owner: Name of the format.
        model: Whose heads they are.
        most_modules: How many the format keeps at most.

    Raises:
        ValueError: If they are of another kind, or have what the format cannot say.
    """
    heads = model.heads
    if not isinstance(heads, SequentialHeads):
        refuse(owner, f"the format keeps SequentialHeads, the model has {type(heads).__name__}; see docs/interop.md.")
    if heads.num_horizons < 2:
        refuse(owner, "the heads have no horizon beyond the first, so there is nothing to write.")
    if len(model.unembedding.own_weights):
        refuse(owner, "modules of this format share the output matrix; train with own_unembeddings=False.")
    if heads.embedding_width != heads.d_model:
        refuse(owner, f"embeddings must be as wide as states ({heads.d_model}), got {heads.embedding_width}.")
    if most_modules is not None and len(heads.steps) > most_modules:
        refuse(
            owner,
            f"the format keeps {most_modules} module, the heads have {len(heads.steps)}; "
            "train with shared=True, or with num_horizons=2.",
        )
    if len(heads.norms) < len(heads.steps):
        refuse(owner, "every module of this format has a norm of its own; train with shared_norm=False.")
    return heads


def conventions_of(heads: SequentialHeads) -> Conventions:
    """Return how these heads are meant.

    Args:
        heads: Behind a trunk whose last step is a norm.
    """
    return Conventions(
        concatenation="embedding_first" if heads.steps[0].embedding_first else "state_first",
        trunk_state="after_norm",
        chain_state="after_norm" if heads.chain_norm else "before_norm",
        position_0="token",
    )


def check_sizes(owner: str, model: MTPModel, heads: SequentialHeads, sizes: Sizes, *, any_ffn: bool = False) -> None:
    """Refuse heads that one configuration cannot describe together with its trunk.

    Args:
        owner: Name of the format.
        model: The heads' own.
        heads: To be written.
        sizes: What the configuration says.
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
            refuse(owner, f"one config.json describes trunk and heads, but {name} is {found} here and {wanted} there.")


def write_modules(
    owner: str, heads: SequentialHeads, names: Callable[[int], ModuleNames], style: LayerStyle
) -> dict[str, Tensor]:
    """Return the tensors of all modules.

    Args:
        owner: Name of the format.
        heads: To be written.
        names: Of each module's tensors.
        style: Of the format.
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
    """Take the tensors of all modules, and return them by the names of an :class:`~mtp_modules.MTPModel`.

    Args:
        tensors: Of the checkpoint.
        names: Of each module's tensors.
        count: How many modules.
        style: Of the format.
        shape: Of their layers.
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
    """Make heads that are still to be filled.

    Args:
        owner: Name of the format.
        sizes: Of the model.
        shape: Of the modules' layers.
        conventions: How the heads are meant.
        count: How many modules there are.
        num_horizons: More than ``count + 1`` if a single module shall serve several horizons; ``None`` if not.

    Raises:
        ValueError: If the heads are meant in a way that ours are not, or the modules are too few.
    """
    if conventions.position_0 == "zero":
        refuse(owner, "SequentialHeads take the token's embedding at position 0, the file says position_0=zero.")
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
