"""Training with Lightning: module, optimizer, schedules, callbacks, checkpoints."""

from mtp_modules.training.auxiliary import prepare_objectives
from mtp_modules.training.blocks import checkpoint_blocks, compile_blocks, prepare_blocks
from mtp_modules.training.callbacks import HeadsProgressBar, HeadsTable, PredictionWriter
from mtp_modules.training.charts import GroupedCharts
from mtp_modules.training.checkpoint_io import AtomicCheckpointIO
from mtp_modules.training.draft_tokens import choose_draft_tokens
from mtp_modules.training.flops import flops_per_token, step_flops, training_flops
from mtp_modules.training.last_checkpoint import LastCheckpoint
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
from mtp_modules.training.signals import GracefulStop
from mtp_modules.training.starting import init_from
from mtp_modules.training.strategies import (
    check_compilation,
    check_gradients,
    check_strategy_name,
    check_trainer,
    fill_data_parallel_size,
)
from mtp_modules.training.summary import PartsSummary
from mtp_modules.training.teacher import TeacherModel
from mtp_modules.training.tensor_parallel import (
    check_same_tokens,
    clip_gradients,
    parallelize,
    share_random_state,
    tensor_parallelize,
)

__all__ = [
    "AtomicCheckpointIO",
    "GracefulStop",
    "GradientConflict",
    "GroupedCharts",
    "HeadsProgressBar",
    "HeadsTable",
    "LastCheckpoint",
    "LearningRateSchedule",
    "MTPModule",
    "MuonWithAdamW",
    "PartsSummary",
    "PredictionWriter",
    "Sharding",
    "TeacherModel",
    "TokenThroughput",
    "WarmupDecay",
    "check_compilation",
    "check_gradients",
    "check_same_tokens",
    "check_strategy_name",
    "check_trainer",
    "checkpoint_blocks",
    "choose_draft_tokens",
    "clip_gradients",
    "compile_blocks",
    "fill_data_parallel_size",
    "flops_per_token",
    "gradient_conflict",
    "gradient_norms",
    "init_from",
    "materialize",
    "muon_parameter_groups",
    "parallelize",
    "prepare_blocks",
    "prepare_objectives",
    "shard_model",
    "share_random_state",
    "step_flops",
    "tensor_parallelize",
    "training_flops",
]
