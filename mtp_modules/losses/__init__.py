"""Losses: targets, weights, and the output matrix with its cross-entropy."""

from mtp_modules.core.outputs import LossTerms
from mtp_modules.losses.functional import multi_token_loss
from mtp_modules.losses.linear_cross_entropy import (
    FusedLinearCrossEntropy,
    NaiveLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
    TorchLinearCrossEntropy,
)
from mtp_modules.losses.multi_token import MultiTokenLoss
from mtp_modules.losses.schedules import HeadCurriculum, LinearWeightSchedule, StepwiseWeightSchedule
from mtp_modules.losses.weights import AuxiliaryWeights, ExplicitWeights, GeometricWeights, UniformWeights

__all__ = [
    "AuxiliaryWeights",
    "ExplicitWeights",
    "FusedLinearCrossEntropy",
    "GeometricWeights",
    "HeadCurriculum",
    "LinearWeightSchedule",
    "LossTerms",
    "MultiTokenLoss",
    "NaiveLinearCrossEntropy",
    "RecomputeLinearCrossEntropy",
    "SequentialLinearCrossEntropy",
    "StepwiseWeightSchedule",
    "TorchLinearCrossEntropy",
    "UniformWeights",
    "multi_token_loss",
]
