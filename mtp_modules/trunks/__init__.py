"""Trunks: tokens to hidden states."""

from mtp_modules.trunks.huggingface import HuggingFaceTrunk
from mtp_modules.trunks.recomputed import RecomputedTrunk, ReplayState
from mtp_modules.trunks.recurrent import RecurrentTrunk
from mtp_modules.trunks.transformer import TransformerTrunk

__all__ = ["HuggingFaceTrunk", "RecomputedTrunk", "RecurrentTrunk", "ReplayState", "TransformerTrunk"]
