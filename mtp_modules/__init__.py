"""Heads, losses and decoders for language models that predict several tokens at once.

The contracts are in :mod:`mtp_modules.core.interfaces`.
"""

from mtp_modules.core import Heads, Tokenizer, Trunk, build, describe, future_targets
from mtp_modules.decoders import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.heads import (
    BlockDiffusionHeads,
    ChainedHeads,
    ConditionedHeads,
    EarlyExitHeads,
    FusedFeatureHeads,
    JointHeads,
    LinearHeads,
    ParallelHeads,
    RecurrentHeads,
    ResidualHeads,
    SequentialHeads,
)
from mtp_modules.loading import load_model
from mtp_modules.losses import (
    AuxiliaryWeights,
    ExplicitWeights,
    GeometricWeights,
    MultiTokenLoss,
    NaiveLinearCrossEntropy,
    UniformWeights,
)
from mtp_modules.metrics import PerHeadMetrics
from mtp_modules.model import MTPModel
from mtp_modules.trunks import HuggingFaceTrunk, RecurrentTrunk, TransformerTrunk

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveDecoder",
    "AuxiliaryWeights",
    "BlockDiffusionHeads",
    "ChainedHeads",
    "ConditionedHeads",
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
    "Trunk",
    "UniformWeights",
    "build",
    "describe",
    "future_targets",
    "load_model",
]
