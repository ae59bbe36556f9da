"""Training with Lightning: module, optimizer, schedules, callbacks, checkpoints."""

from mtp_modules.training.blocks import checkpoint_blocks, compile_blocks, prepare_blocks
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
from mtp_modules.training.parallel import Sharding, materialize, shard_model
from mtp_modules.training.schedules import LearningRateSchedule, WarmupDecay
from mtp_modules.training.strategies import check_gradients, check_strategy_name, check_trainer, fill_data_parallel_size

__all__ = [
    "GracefulStop",
    "GradientConflict",
    "HeadsProgressBar",
    "HeadsTable",
    "LearningRateSchedule",
    "MTPModule",
    "MuonWithAdamW",
    "PredictionWriter",
    "Sharding",
    "TokenThroughput",
    "WarmupDecay",
    "check_gradients",
    "check_strategy_name",
    "check_trainer",
    "checkpoint_blocks",
    "compile_blocks",
    "fill_data_parallel_size",
    "find_checkpoint",
    "flops_per_token",
    "gradient_conflict",
    "gradient_norms",
    "load_model",
    "materialize",
    "muon_parameter_groups",
    "prepare_blocks",
    "shard_model",
    "training_flops",
]
