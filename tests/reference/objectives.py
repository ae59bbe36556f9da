"""Auxiliary objectives example by example, in plain Python: what the fast ones must equal."""

import math
from collections.abc import Sequence

import torch

from mtp_modules.core.auxiliary import AuxiliaryText


def upcoming(text: AuxiliaryText, row: int, place: int, distance: int) -> int | None:
    """Return the token at a distance from a place, if it is a target of the place."""
    at = place + distance
    if at >= text.tokens.shape[1]:
        return None
    if text.document_ids is not None:
        ids = text.document_ids[row, place : at + 1].tolist()
        if len(set(ids)) > 1:
            return None
    token = int(text.tokens[row, at])
    counts = token >= 0 and (text.loss_mask is None or bool(text.loss_mask[row, at]))
    return token if counts else None


def token_order(
    logits: torch.Tensor, text: AuxiliaryText, window: int
) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Return the loss of every example, and where it is.

    Args:
        logits: ``(B, T, V)``.
        text: Of the batch.
        window: How far to look.
    """
    losses, places = [], []
    for row in range(len(logits)):
        for place in range(text.length):
            scores = [-math.inf] * logits.shape[2]
            for distance in range(window, 0, -1):
                token = upcoming(text, row, place, distance)
                if token is not None:
                    scores[token] = window - distance
            if max(scores) > -math.inf:
                target = torch.tensor(scores, dtype=logits.dtype).softmax(0)
                losses.append(-(target * logits[row, place].log_softmax(0)).sum())
                places.append((row, place))
    return losses, places


def bag_of_words(
    logits: torch.Tensor, text: AuxiliaryText, window: int, weights: Sequence[float]
) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Return the loss of every example, and where it is; see :func:`token_order`.

    Args:
        logits: ``(B, T, V)``.
        text: Of the batch.
        window: The farthest token.
        weights: Of each token.
    """
    losses, places = [], []
    for row in range(len(logits)):
        for place in range(text.length):
            bag = {upcoming(text, row, place, distance) for distance in range(2, window + 1)} - {None}
            if not bag:
                continue
            chances = logits[row, place].sigmoid()
            terms = [
                -weight * (chances[token] if token in bag else 1 - chances[token]).log()
                for token, weight in enumerate(weights)
            ]
            losses.append(torch.stack(terms).sum() / sum(weights))
            places.append((row, place))
    return losses, places
