"""Trunks: tokens to hidden states."""

from mtp_modules.trunks.recurrent import RecurrentTrunk
from mtp_modules.trunks.transformer import TransformerTrunk

__all__ = ["RecurrentTrunk", "TransformerTrunk"]
