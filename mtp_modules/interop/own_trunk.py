"""Replace a transformers trunk by our own trunk with the same weights."""

import copy

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import describe
from mtp_modules.interop.format import fill
from mtp_modules.interop.layers import LayerStyle
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import NamedTrunk, read_sizes, read_trunk
from mtp_modules.model import MTPModel

_QK_NORM = {"llama": False, "mistral": False, "qwen3": True}
"""Architectures that :class:`~mtp_modules.TransformerTrunk` can represent; whether they normalise queries and keys."""


def with_own_trunk(model: MTPModel) -> MTPModel:
    """Return the model with a :class:`~mtp_modules.TransformerTrunk` of the same weights as its Hugging Face trunk.

    The logits are equal up to rounding. The new model decodes faster, can be compiled for decoding, and loads without
    ``transformers``. Its weights are copies. A model whose trunk is not a ``transformers`` model is returned unchanged.

    Args:
        model: A model with a :class:`~mtp_modules.HuggingFaceTrunk` of a Llama, a Mistral or a Qwen3, and any heads.

    Raises:
        ValueError: If the trunk has another architecture, or if our layers cannot compute what it computes.
    """
    owner, trunk = "with_own_trunk", model.trunk
    if not isinstance(trunk, NamedTrunk):
        return model
    config = trunk.foreign_config()
    kind = config["model_type"]
    if kind not in _QK_NORM:
        refuse(owner, f"model_type is {kind}, TransformerTrunk supports {', '.join(_QK_NORM)}; use the model as is.")
    if trunk.max_positions:
        config = {**config, "max_position_embeddings": trunk.max_positions}
    sizes = read_sizes(owner, config, qk_norm=_QK_NORM[kind], any_head_dim=True)._replace(tied=model.unembedding.tied)
    output = {} if sizes.tied else {"lm_head.weight": model.unembedding.weight}
    tensors = Tensors(owner, {**trunk.foreign_state(), **output})
    own, state = read_trunk(tensors, sizes, LayerStyle(), feature_layers=trunk.feature_layers)
    tensors.finish()
    options = {name: value for name, value in describe(model)["init_args"].items() if name not in ("trunk", "heads")}
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("trunk.")}
    made = fill(own, copy.deepcopy(model.heads), rest | state, **options)
    return made.to(model.unembedding.weight).train(model.training)
