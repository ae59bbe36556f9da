"""Building blocks that trunks and heads share."""

from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.chunks import ChunkedState
from mtp_modules.layers.documents import DocumentRows, documents_apart, positions_in_documents
from mtp_modules.layers.last_hidden import LastHiddenState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer

__all__ = [
    "ChunkedState",
    "DocumentRows",
    "KeyValueState",
    "LastHiddenState",
    "RMSNorm",
    "RotaryPositions",
    "TransformerLayer",
    "documents_apart",
    "positions_in_documents",
]
