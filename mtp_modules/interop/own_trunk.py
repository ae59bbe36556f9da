"""The same model with our own trunk in the place of one of transformers."""

import copy

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import describe
from mtp_modules.interop.format import fill
from mtp_modules.interop.layers import LayerStyle
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import NamedTrunk, read_sizes, read_trunk
from mtp_modules.model import MTPModel

_QK_NORM = {"llama": False, "mistral": False, "qwen3": True}
"""Architectures that :class:`~mtp_modules.TransformerTrunk` can be, and whether they normalise queries and keys."""


def with_own_trunk(model: MTPModel) -> MTPModel:
    """Return the model with a :class:`~mtp_modules.TransformerTrunk` of the same weights as its Hugging Face trunk.

    It says the same, up to rounding, but decodes faster, can be compiled for decoding, and is loaded without
    ``transformers``. The weights are copies. A model with a trunk that is not one of ``transformers`` is returned as it
    is.

    Args:
        model: Whose trunk is a :class:`~mtp_modules.HuggingFaceTrunk` of a Llama, a Mistral or a Qwen3, with any heads.

    Raises:
        ValueError: If the trunk is of another architecture, or computes what our layers cannot.
    """
    owner, trunk = "with_own_trunk", model.trunk
    if not isinstance(trunk, NamedTrunk):
        return model
    config = trunk.foreign_config()
    kind = config["model_type"]
    if kind not in _QK_NORM:
        refuse(owner, f"model_type is {kind}, TransformerTrunk can be {', '.join(_QK_NORM)}; use the model as it is.")
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
