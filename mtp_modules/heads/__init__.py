"""Heads: one hidden state to one state a horizon."""

from mtp_modules.heads.joint import JointHeads
from mtp_modules.heads.linear import LinearHeads
from mtp_modules.heads.parallel import ParallelHeads
from mtp_modules.heads.recurrent import RecurrentHeads
from mtp_modules.heads.residual import ResidualHeads
from mtp_modules.heads.sequential import SequentialHeads

__all__ = ["JointHeads", "LinearHeads", "ParallelHeads", "RecurrentHeads", "ResidualHeads", "SequentialHeads"]
