"""The model without heads, for formats that keep heads alone: an engine serves both together."""

from typing import Any

from mtp_modules.core.shapes import Tensor
from mtp_modules.interop.layers import LayerStyle, shape_of
from mtp_modules.interop.trunks import NamedTrunk, trunk_config, write_trunk
from mtp_modules.model import MTPModel
from mtp_modules.trunks import TransformerTrunk

BASE = "base"
"""Name of the folder of the model without heads, inside the folder of the heads."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def no_base(model: MTPModel) -> str | None:
    """Return why no engine knows the trunk of a model; ``None`` if it can be written.

    Args:
        model: The model that owns the trunk.
    """
    trunk = model.trunk
    if isinstance(trunk, NamedTrunk):
        if any(trunk.foreign_config().get(name) for name in _EXPERTS):
            return "transformers fuses its experts, and their names in a file are not known here"
        scale = getattr(trunk, "output_scale", 1.0)
        return None if scale == 1.0 else f"it multiplies hidden states by {scale:g}, which engines do to logits"
    if not isinstance(trunk, TransformerTrunk):
        return f"no engine has a {type(trunk).__name__}"
    if trunk.num_previous:
        return f"no engine embeds previous tokens, and num_previous is {trunk.num_previous}"
    return None


def write_base(owner: str, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and configuration of the model without heads.

    A :class:`~mtp_modules.TransformerTrunk` becomes a Llama, or a Qwen3 where it normalises queries and keys. A trunk
    of transformers stays what it is, with the weights that it computes with: none is quantised.

    Args:
        owner: Name of the format.
        model: A model for which :func:`no_base` returns ``None``.
    """
    if isinstance(model.trunk, NamedTrunk):
        config = model.trunk.foreign_config() | {"tie_word_embeddings": model.unembedding.tied}
        return write_trunk(owner, model, LayerStyle()), config
    assert isinstance(model.trunk, TransformerTrunk)
    qk_norm = shape_of(model.trunk.layers[0]).qk_norm
    style = LayerStyle(qk_norm=qk_norm)
    kind = "Qwen3" if qk_norm else "Llama"
    config = trunk_config(owner, model, style, any_head_dim=True)
    config |= {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower()}
    return write_trunk(owner, model, style), config
