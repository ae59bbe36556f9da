"""The kinds of heads that ``retrofit.py`` compares, and what a configuration needs for each."""

import copy
from typing import Any

LAYER = {"num_heads": 9, "num_kv_heads": 3}
GAIN = {"norm_gain": 2.2}


def _heads(name: str, **given: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": given}


def _around(name: str, heads: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": {"heads": heads, **given}}


def _transition(heads: dict[str, Any]) -> dict[str, Any]:
    return _around("TransitionHeads", heads, rank=64)


_BLOCK = _heads("ContextBlockHeads", **LAYER, **GAIN, num_layers=1)
KINDS: dict[str, dict[str, Any]] = {
    "residual": _heads("ResidualHeads"),
    "residual_transition": _transition(_heads("ResidualHeads")),
    "conditioned": _heads("ConditionedHeads"),
    "recurrent": _heads("RecurrentHeads", width=1152, **GAIN),
    "sequential": _heads("SequentialHeads", **LAYER, shared=True, **GAIN),
    "diffusion": _heads("BlockDiffusionHeads", **LAYER),
    "early_exit": _heads("EarlyExitHeads", **GAIN),
    "fused_feature": _heads("FusedFeatureHeads", **LAYER, **GAIN),
    "eagle3": _heads("FusedFeatureHeads", **LAYER, **GAIN, merge=False, fc_norm=True, norm_output=True),
    "context_block": _BLOCK,
    "context_block_transition": _transition(_BLOCK),
    "context_block_confidence": _around("ConfidenceHeads", _transition(_BLOCK)),
    "joint": _heads("JointHeads", num_components=2),
    # Horizon 1 has weights of its own in these, so that the model does not stay what it was.
    "linear": _heads("LinearHeads"),
    "linear_transition": _transition(_heads("LinearHeads")),
    "parallel": _heads("ParallelHeads", **LAYER),
    "causal": _heads("ChainedHeads", **LAYER, order="causal"),
    "anticausal": _heads("ChainedHeads", **LAYER, order="anticausal"),
}
READ_INNER_LAYERS = ("EarlyExitHeads", "FusedFeatureHeads", "ContextBlockHeads")


def innermost(heads: dict[str, Any]) -> dict[str, Any]:
    """Return the heads inside all wrappers."""
    while "heads" in heads["init_args"]:
        heads = heads["init_args"]["heads"]
    return heads


def sections_of(sections: dict[str, Any], kind: str, feature_layers: list[int]) -> dict[str, Any]:
    """Return a configuration with heads of a kind, and what has to change for them."""
    sections = copy.deepcopy(sections)
    model = sections["model"]
    model["trunk"]["init_args"]["feature_layers"] = feature_layers  # of all kinds, so that they share cached states
    horizons = innermost(model["heads"])["init_args"]["num_horizons"]  # with another number, windows are other ones
    model["heads"] = copy.deepcopy(KINDS[kind])
    innermost(model["heads"])["init_args"]["num_horizons"] = horizons
    if innermost(model["heads"])["class_path"] in READ_INNER_LAYERS:
        innermost(model["heads"])["init_args"]["num_features"] = len(feature_layers)
    # Its distribution is over the whole vocabulary, and imitates no teacher; fewer positions make more steps.
    if kind == "joint":
        model["num_draft_tokens"] = None
        model["loss"]["init_args"] |= {"distillation": 0.0, "share_of_positions": 0.05}
    return sections
