"""Building blocks that trunks and heads share."""

from mtp_modules.layers.cache import ChunkedState, KeyValueState, LastHiddenState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer

__all__ = ["ChunkedState", "KeyValueState", "LastHiddenState", "RMSNorm", "RotaryPositions", "TransformerLayer"]
