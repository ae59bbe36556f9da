"""Heads: from one hidden state to one state per horizon."""

from mtp_modules.heads.block_diffusion import BlockDiffusionHeads
from mtp_modules.heads.chained import ChainedHeads
from mtp_modules.heads.conditioned import ConditionedHeads
from mtp_modules.heads.confidence import ConfidenceHeads
from mtp_modules.heads.context_block import ContextBlockHeads
from mtp_modules.heads.early_exit import EarlyExitHeads
from mtp_modules.heads.fused_feature import FusedFeatureHeads
from mtp_modules.heads.joint import JointHeads
from mtp_modules.heads.linear import LinearHeads
from mtp_modules.heads.parallel import ParallelHeads
from mtp_modules.heads.recurrent import RecurrentHeads
from mtp_modules.heads.residual import ResidualHeads
from mtp_modules.heads.sequential import SequentialHeads
from mtp_modules.heads.transition import TransitionHeads

__all__ = [
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
]
