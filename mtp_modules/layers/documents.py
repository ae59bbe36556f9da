"""Packed rows: positions within documents, and unpacking to one row per document."""

from typing import NamedTuple

import torch

from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.targets import document_runs


def positions_in_documents(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return each token's position in its document, counted from 0.

    Args:
        document_ids: The document of every token; a change from one token to the next starts a new document.
    """
    runs = document_runs(document_ids)
    steps = torch.arange(runs.shape[1], device=runs.device).expand_as(runs)
    starts = torch.zeros_like(runs)
    starts[:, 1:] = torch.where(runs[:, 1:] != runs[:, :-1], steps[:, 1:], 0)
    return steps - starts.cummax(dim=1).values


class UnpackedDocuments(NamedTuple):
    """The documents of a packed batch, one per row.

    Attributes:
        tokens: ``(N, L)``, the documents, padded at the end with token 0.
        row: ``(B, T)``, the row of each token of the batch in ``tokens``.
        column: ``(B, T)``, its column there.
    """

    tokens: Int[Tensor, "N L"]
    row: Int[Tensor, "B T"]
    column: Int[Tensor, "B T"]


def unpack_documents(tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> UnpackedDocuments:
    """Give every document a row of its own.

    ``values[unpacked.row, unpacked.column]`` packs values that were computed on the unpacked rows.

    Args:
        tokens: A packed batch.
        document_ids: The document of every token.
    """
    runs = document_runs(document_ids)
    counts = runs.amax(dim=1) + 1
    row = runs + (counts.cumsum(0) - counts)[:, None]
    column = positions_in_documents(document_ids)
    unpacked = tokens.new_zeros(int(counts.sum()), int(column.max()) + 1)
    unpacked[row, column] = tokens
    return UnpackedDocuments(unpacked, row, column)
