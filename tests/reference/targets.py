"""Which token each head predicts, one element at a time."""

import torch
from torch import Tensor


def same_document(document_ids: Tensor | None, row: int, start: int, end: int) -> bool:
    """Say whether no document ends between two tokens of a row."""
    if document_ids is None:
        return True
    return all(document_ids[row, step] == document_ids[row, start] for step in range(start, end + 1))


def future_targets(
    tokens: Tensor, horizons: tuple[int, ...], document_ids: Tensor | None = None, loss_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return targets and whether they count, ``(B, T, H)``."""
    rows, length = tokens.shape[0], tokens.shape[1] - max(horizons)
    targets = torch.empty(rows, length, len(horizons), dtype=tokens.dtype)
    valid = torch.empty(rows, length, len(horizons), dtype=torch.bool)
    for b in range(rows):
        for t in range(length):
            for index, h in enumerate(horizons):
                targets[b, t, index] = tokens[b, t + h]
                learned = tokens[b, t + h] >= 0 and (loss_mask is None or bool(loss_mask[b, t + h]))
                valid[b, t, index] = learned and same_document(document_ids, b, t, t + h)
    return targets, valid
