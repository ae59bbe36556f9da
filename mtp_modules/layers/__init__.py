"""Building blocks of trunks and heads."""

from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.chunks import ChunkedState
from mtp_modules.layers.documents import UnpackedDocuments, positions_in_documents, unpack_documents
from mtp_modules.layers.last_hidden import LastHiddenState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer

__all__ = [
    "ChunkedState",
    "KeyValueState",
    "LastHiddenState",
    "RMSNorm",
    "RotaryPositions",
    "TransformerLayer",
    "UnpackedDocuments",
    "positions_in_documents",
    "unpack_documents",
]
