"""Beam searches that recompute every hypothesis for every token, and look at all tokens."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_modules import MTPModel


class Text(NamedTuple):
    tokens: tuple[int, ...]
    log_probability: float
    reason: str | None = None


def log_probs(
    model: MTPModel, text: Sequence[int], horizon_index: int = 0, allowed: Collection[int] | None = None
) -> Tensor:
    """Return a head's log-probabilities of the token after ``text``."""
    padded = torch.tensor([[*text, *[0] * (model.lookahead - horizon_index)]])
    state = model(padded)[horizon_index][0, len(text) - 1 - horizon_index]
    logits = model.unembedding.logits(state, horizon_index).detach()
    if allowed is not None:
        logits[[token for token in range(len(logits)) if token not in allowed]] = -math.inf
    return logits.log_softmax(dim=-1)


def beam_search(
    model: MTPModel,
    prompt: Sequence[int],
    *,
    num_beams: int,
    length_penalty: float = 0.0,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    allowed: Collection[int] | None = None,
    num_drafts: int = 0,
    num_blocks: int = 0,
) -> list[Text]:
    """Return the beams, best first; with ``num_blocks``, of the search over whole blocks that the heads propose."""
    most = max_new_tokens
    if model.trunk.max_positions is not None:
        most = min(most, model.trunk.max_positions - len(prompt) + 1)

    def rank(text: Text) -> float:
        return round(text.log_probability / len(text.tokens) ** length_penalty, 9)

    def grown(text: Text, token: int, gained: float) -> Text:
        tokens = (*text.tokens, token)
        reason = None
        if len(tokens) == most:
            reason = "length" if most == max_new_tokens else "context"
        return Text(tokens, text.log_probability + gained, "stop" if token in stop_tokens else reason)

    def extended(text: Text) -> list[Text]:
        gains = log_probs(model, [*prompt, *text.tokens], 0, allowed).tolist()
        return [grown(text, token, gain) for token, gain in enumerate(gains) if gain > -math.inf]

    def in_blocks(beams: list[Text]) -> list[Text]:
        goes_on = [text for text in beams if text.reason is None]
        guesses: list[tuple[float, Text, tuple[int, ...]]] = [(text.log_probability, text, ()) for text in goes_on]
        depth = min(num_drafts, most - len(goes_on[0].tokens) - 1)
        for draft in range(1, depth + 1):
            longer = [
                (total + gain, text, (*block, token))
                for total, text, block in guesses
                for token, gain in enumerate(log_probs(model, [*prompt, *text.tokens, *block], draft, allowed).tolist())
                if gain > -math.inf
            ]
            guesses = sorted(longer, key=lambda guess: -guess[0])[:num_blocks]
        found: dict[tuple[int, ...], Text] = {}
        for _, text, block in guesses:
            for token in block:
                if text.reason is None:
                    gain = float(log_probs(model, [*prompt, *text.tokens], 0, allowed)[token])
                    text = grown(text, token, gain)
            found.setdefault(text.tokens, text)
        return [text for text in beams if text.reason is not None] + list(found.values())

    beams = [Text((), 0.0)]
    first = True
    while any(text.reason is None for text in beams):
        if num_blocks and not first:
            beams = in_blocks(beams)
        keyed = []
        for index, text in enumerate(beams):
            if text.reason is not None:
                keyed.append((-rank(text), -1, index, text))
            else:
                keyed += [(-rank(longer), longer.tokens[-1], index, longer) for longer in extended(text)]
        beams = [text for *_, text in sorted(keyed)[:num_beams]]
        first = False
    return beams
