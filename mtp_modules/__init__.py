"""Heads, losses and decoders for language models that predict several tokens at once.

The contracts are in :mod:`mtp_modules.core.interfaces`. Names are imported when they are asked for: the command line
sets how torch's threads wait before torch loads.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_modules.core import Heads, Tokenizer, Trunk, build, describe, future_targets
    from mtp_modules.decoders import AutoregressiveDecoder, SpeculativeDecoder
    from mtp_modules.heads import (
        BlockDiffusionHeads,
        ChainedHeads,
        ConditionedHeads,
        ConfidenceHeads,
        ContextBlockHeads,
        EarlyExitHeads,
        FusedFeatureHeads,
        JointHeads,
        LinearHeads,
        ParallelHeads,
        RecurrentHeads,
        ResidualHeads,
        SequentialHeads,
        TransitionHeads,
    )
    from mtp_modules.loading import load_model
    from mtp_modules.losses import (
        AuxiliaryWeights,
        ExplicitWeights,
        GeometricWeights,
        MultiTokenLoss,
        NaiveLinearCrossEntropy,
        UniformWeights,
        multi_token_loss,
    )
    from mtp_modules.metrics import PerHeadMetrics
    from mtp_modules.model import MTPModel
    from mtp_modules.trunks import HuggingFaceTrunk, RecurrentTrunk, TransformerTrunk

_HOMES = {
    "core": (
        "Heads",
        "Tokenizer",
        "Trunk",
        "build",
        "describe",
        "future_targets",
    ),
    "decoders": (
        "AutoregressiveDecoder",
        "SpeculativeDecoder",
    ),
    "heads": (
        "BlockDiffusionHeads",
        "ChainedHeads",
        "ConditionedHeads",
        "ConfidenceHeads",
        "ContextBlockHeads",
        "EarlyExitHeads",
        "FusedFeatureHeads",
        "JointHeads",
        "LinearHeads",
        "ParallelHeads",
        "RecurrentHeads",
        "ResidualHeads",
        "SequentialHeads",
        "TransitionHeads",
    ),
    "loading": ("load_model",),
    "losses": (
        "AuxiliaryWeights",
        "ExplicitWeights",
        "GeometricWeights",
        "MultiTokenLoss",
        "NaiveLinearCrossEntropy",
        "UniformWeights",
        "multi_token_loss",
    ),
    "metrics": ("PerHeadMetrics",),
    "model": ("MTPModel",),
    "trunks": (
        "HuggingFaceTrunk",
        "RecurrentTrunk",
        "TransformerTrunk",
    ),
}

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveDecoder",
    "AuxiliaryWeights",
    "BlockDiffusionHeads",
    "ChainedHeads",
    "ConditionedHeads",
    "ConfidenceHeads",
    "ContextBlockHeads",
    "EarlyExitHeads",
    "ExplicitWeights",
    "FusedFeatureHeads",
    "GeometricWeights",
    "Heads",
    "HuggingFaceTrunk",
    "JointHeads",
    "LinearHeads",
    "MTPModel",
    "MultiTokenLoss",
    "NaiveLinearCrossEntropy",
    "ParallelHeads",
    "PerHeadMetrics",
    "RecurrentHeads",
    "RecurrentTrunk",
    "ResidualHeads",
    "SequentialHeads",
    "SpeculativeDecoder",
    "Tokenizer",
    "TransformerTrunk",
    "TransitionHeads",
    "Trunk",
    "UniformWeights",
    "build",
    "describe",
    "future_targets",
    "load_model",
    "multi_token_loss",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name == module or name in names:
            found = importlib.import_module(f"{__name__}.{module}")
            return found if name == module else getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
