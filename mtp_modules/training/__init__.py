"""Training with Lightning: module, optimizer, schedules, callbacks, checkpoints."""

from mtp_modules.training.callbacks import GracefulStop, HeadsProgressBar, HeadsTable, PredictionWriter
from mtp_modules.training.checkpointing import find_checkpoint, load_model
from mtp_modules.training.flops import flops_per_token, training_flops
from mtp_modules.training.module import MTPModule
from mtp_modules.training.monitoring import (
    GradientConflict,
    TokenThroughput,
    gradient_conflict,
    gradient_norms,
)
from mtp_modules.training.optimizers import MuonWithAdamW, muon_parameter_groups
from mtp_modules.training.schedules import LearningRateSchedule, WarmupDecay

__all__ = [
    "GracefulStop",
    "GradientConflict",
    "HeadsProgressBar",
    "HeadsTable",
    "LearningRateSchedule",
    "MTPModule",
    "MuonWithAdamW",
    "PredictionWriter",
    "TokenThroughput",
    "WarmupDecay",
    "find_checkpoint",
    "flops_per_token",
    "gradient_conflict",
    "gradient_norms",
    "load_model",
    "muon_parameter_groups",
    "training_flops",
]
