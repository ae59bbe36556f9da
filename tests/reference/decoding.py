"""Greedy decoding that reads everything again for every token."""

from collections.abc import Collection, Sequence

import torch

from mtp_modules import MTPModel


def decode(
    model: MTPModel, prompt: Sequence[int], *, max_new_tokens: int, stop_tokens: Collection[int] = ()
) -> tuple[list[int], str]:
    """Return the new tokens and why there are no more."""
    text, limit = list(prompt), model.trunk.max_positions
    while True:
        padded = torch.tensor([text + [0] * model.lookahead])  # causal: what comes after cannot matter
        token = int(model.unembedding.logits(model(padded)[0][0, -1]).argmax())
        was_read = len(text)
        text.append(token)
        if token in stop_tokens:
            return text[len(prompt) :], "stop"
        if len(text) - len(prompt) == max_new_tokens:
            return text[len(prompt) :], "length"
        if was_read == limit:
            return text[len(prompt) :], "context"


def count_accepted(drafts: Sequence[int], choices: Sequence[int]) -> int:
    """Return how many drafts are right before the first that is wrong."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return accepted
