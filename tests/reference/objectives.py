"""Auxiliary objectives example by example, in plain Python: what the fast ones must equal."""

import math
from collections.abc import Callable, Sequence

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


def next_span(
    text: AuxiliaryText, row: int, place: int, window: int, ends: Sequence[bool], texts: Sequence[str]
) -> set[int | None]:
    """Return the tokens of the first span that begins behind a place, as far as they are targets and within reach.

    Args:
        text: Of the batch.
        row: Of the place.
        place: Position.
        window: The farthest token.
        ends: Whether each token ends a span.
        texts: Of each token.
    """
    tokens = text.tokens[row].tolist()
    documents = [0] * len(tokens) if text.document_ids is None else text.document_ids[row].tolist()
    number, ended, numbers = 0, False, []
    for at, token in enumerate(tokens):
        blank = token >= 0 and not texts[token].strip()
        if (at and documents[at] != documents[at - 1]) or (ended and not blank):
            number, ended = number + 1, False
        numbers.append(number)
        ended = ended or (token >= 0 and ends[token])
    reach = range(place + 1, min(len(tokens), place + window + 1))
    return {upcoming(text, row, place, at - place) for at in reach if numbers[at] == numbers[place] + 1}


def bag_of_words(
    logits: torch.Tensor,
    text: AuxiliaryText,
    weights: Sequence[float],
    bag_of: Callable[[int, int], set[int | None]],
) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Return the loss of every example, and where it is; see :func:`token_order`.

    Args:
        logits: ``(B, T, V)``.
        text: Of the batch.
        weights: Of each token.
        bag_of: Returns the bag of a row and a place, perhaps with ``None`` in it.
    """
    losses, places = [], []
    for row in range(len(logits)):
        for place in range(text.length):
            bag = bag_of(row, place) - {None}
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
