"""The same model with our own trunk in the place of one of transformers."""

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import build, describe
from mtp_modules.interop.layers import LayerStyle
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import NamedTrunk, read_sizes, read_trunk
from mtp_modules.model import MTPModel

_QK_NORM = {"llama": False, "mistral": False, "qwen3": True}
"""Architectures that :class:`~mtp_modules.TransformerTrunk` can be, and whether they normalise queries and keys."""


def with_own_trunk(model: MTPModel) -> MTPModel:
    """Return the model with a :class:`~mtp_modules.TransformerTrunk` of the same weights as its Hugging Face trunk.

    It says the same, up to rounding, but decodes faster, can be compiled for decoding, and is loaded without
    ``transformers``. The weights are copies.

    Args:
        model: Whose trunk is a :class:`~mtp_modules.HuggingFaceTrunk` of a Llama, a Mistral or a Qwen3, with any heads.

    Raises:
        ValueError: If the trunk is of another kind, or computes what our layers cannot.
    """
    owner, trunk = "with_own_trunk", model.trunk
    if not isinstance(trunk, NamedTrunk):
        refuse(owner, f"{type(trunk).__name__} is no model of transformers; use the model as it is.")
    config = trunk.foreign_config()
    kind = config["model_type"]
    if kind not in _QK_NORM:
        refuse(owner, f"model_type is {kind}, TransformerTrunk can be {', '.join(_QK_NORM)}; use the model as it is.")
    sizes, tied = read_sizes(owner, config, qk_norm=_QK_NORM[kind], any_head_dim=True), model.unembedding.tied
    sizes = sizes._replace(max_positions=trunk.max_positions or sizes.max_positions, tied=tied)
    window = config.get("sliding_window")
    if window is not None and window < sizes.max_positions:
        refuse(
            owner,
            f"config.json says sliding_window={window}, our layers see all of max_positions={sizes.max_positions}; "
            "build the trunk with no more positions than the window.",
        )
    output = {} if tied else {"lm_head.weight": model.unembedding.weight}
    tensors = Tensors(owner, {**trunk.foreign_state(), **output})
    own, state = read_trunk(tensors, sizes, LayerStyle(), feature_layers=trunk.feature_layers)
    tensors.finish()
    described = describe(model)
    described["init_args"]["trunk"] = describe(own)
    made: MTPModel = build(described)
    made.to(model.unembedding.weight)
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("trunk.")}
    made.load_state_dict({**rest, **state})
    return made.train(model.training)
