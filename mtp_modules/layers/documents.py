"""Packed rows: where documents begin, and a row of its own for each."""

from typing import NamedTuple

import torch

from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.targets import document_runs


def positions_in_documents(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count each document's tokens from 0.

    Args:
        document_ids: Which document every token belongs to; a change from one token to the next starts a new one.
    """
    runs = document_runs(document_ids)
    steps = torch.arange(runs.shape[1], device=runs.device).expand_as(runs)
    starts = torch.zeros_like(runs)
    starts[:, 1:] = torch.where(runs[:, 1:] != runs[:, :-1], steps[:, 1:], 0)
    return steps - starts.cummax(dim=1).values


class UnpackedDocuments(NamedTuple):
    """Documents of a packed batch, a row for each.

    Attributes:
        tokens: ``(N, L)``, the documents, padded at their ends with token 0.
        row: ``(B, T)``, the row that each token of the batch has gone to.
        column: ``(B, T)``, its place there.
    """

    tokens: Int[Tensor, "N L"]
    row: Int[Tensor, "B T"]
    column: Int[Tensor, "B T"]


def unpack_documents(tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> UnpackedDocuments:
    """Give every document a row of its own.

    What is read there, as ``values``, is put back by ``values[rows.row, rows.column]``.

    Args:
        tokens: A packed batch.
        document_ids: Which document every token belongs to.
    """
    runs = document_runs(document_ids)
    counts = runs.amax(dim=1) + 1
    row = runs + (counts.cumsum(0) - counts)[:, None]
    column = positions_in_documents(document_ids)
    apart = tokens.new_zeros(int(counts.sum()), int(column.max()) + 1)
    apart[row, column] = tokens
    return UnpackedDocuments(apart, row, column)
