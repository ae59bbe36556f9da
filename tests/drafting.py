"""Heads that draft what a test wants, and a model whose continuation is known."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mtp_modules import Heads, LinearHeads, MTPModel, TransformerTrunk
from mtp_modules.core import DecodingState, Draft
from mtp_modules.core.drafts import DraftSampler, GreedySampler
from mtp_modules.decoders import Round, RoundArrays
from mtp_modules.decoders.sampling.stopping import REASONS
from tests.helpers import VOCAB, float64


def round_of(
    rows: list[int],
    tokens: list[list[int]],
    accepted: list[int],
    drafted: list[int],
    finish_reasons: Sequence[str | None],
) -> Round:
    """Build a round of the lists that its properties give."""
    counts = np.array([len(new) for new in tokens])
    padded = np.full((len(tokens), counts.max()), 99)  # what must not come out
    for row, new in enumerate(tokens):
        padded[row, : len(new)] = new
    reasons = np.array([REASONS.index(reason) for reason in finish_reasons])
    return Round(RoundArrays(np.array(rows), padded, counts, np.array(accepted), np.array(drafted), reasons))


class ScriptedState(DecodingState):
    """The state of the real heads, and which row of the run each row is."""

    def __init__(self, inner: DecodingState) -> None:
        self.inner = inner
        self.rows = list(range(len(inner.lengths)))

    @property
    def lengths(self) -> list[int]:
        return self.inner.lengths

    def commit(self, keep: list[int], path: Tensor | None = None) -> None:
        self.inner.commit(keep, path)

    def select(self, rows: list[int]) -> None:
        self.inner.select(rows)
        self.rows = [self.rows[row] for row in rows]


class ScriptedHeads(Heads):
    """Verify with real heads, and draft what ``script(row, length, num_drafts)`` says after ``length`` read tokens.

    Each draft has ``probability`` by its own distribution.
    """

    def __init__(self, *, heads: Heads, script: Callable[[int, int, int], list[int]], probability: float = 0.9) -> None:
        super().__init__()
        self.heads, self.script, self.d_model, self.probability = heads, script, heads.d_model, probability
        self.num_features = heads.num_features
        self.drafted: list[dict[int, list[int]]] = []
        self.eval()

    @property
    def horizons(self) -> tuple[int, ...]:
        return self.heads.horizons

    def forward(self, hidden: Tensor, **kwargs: Tensor | None) -> tuple[Tensor, ...]:
        return self.heads(hidden, **kwargs)

    def first(self, hidden: Tensor, **kwargs: Tensor | None) -> Tensor:
        return self.heads.first(hidden, **kwargs)

    def flops(self, length: int, num_far: int) -> int:
        return self.heads.flops(length, num_far)

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> ScriptedState:
        return ScriptedState(self.heads.new_state(batch_size, capacity, for_drafts=for_drafts))

    def extend(self, hidden: Tensor, state: DecodingState, **chunk: object) -> Tensor:
        assert isinstance(state, ScriptedState)
        return self.heads.extend(hidden, state.inner, **chunk)

    def draft_states(self, *args: object, **kwargs: object) -> Tensor:
        raise AssertionError("drafts come from the script")

    def draft(
        self,
        token: Tensor,
        state: DecodingState,
        *,
        num_drafts: int,
        embed: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor, int], Tensor],
        sampler: DraftSampler | None = None,
    ) -> Draft:
        assert isinstance(state, ScriptedState)
        script = [self.script(row, state.lengths[b], num_drafts) for b, row in enumerate(state.rows)]
        self.drafted.append(dict(zip(state.rows, script, strict=True)))
        chosen = torch.tensor(script)
        others = (1 - self.probability) / (VOCAB - 1)
        logits = nn.functional.one_hot(chosen, VOCAB).double().mul(self.probability - others).add(others).log()
        sampled = [(sampler or GreedySampler())(depth) for depth in logits.unbind(dim=1)]
        tokens = torch.stack([token for token, _ in sampled], dim=1)
        probs = [of_one for _, of_one in sampled if of_one is not None]
        return Draft(tokens, logits, torch.stack(probs, dim=1) if probs else None)


def copying_script(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], wrong: Callable[[int, int], bool]
) -> Callable[[int, int, int], list[int]]:
    """Draft what plain decoding gives, except where ``wrong(row, place)``; there, any other token."""

    def script(row: int, length: int, num_drafts: int) -> list[int]:
        # `length` tokens are read and one more is emitted, so drafts begin with the token after that.
        first = length - len(prompts[row]) + 1
        tokens = []
        for place in range(first, first + num_drafts):
            token = outputs[row][place] if place < len(outputs[row]) else 0
            tokens.append((token + 1 + place % (VOCAB - 1)) % VOCAB if wrong(row, place) else token)
        return tokens

    return script


def clock(
    num_horizons: int, *, hands: Sequence[int] | None = None, order: Sequence[int] = tuple(range(VOCAB))
) -> MTPModel:
    """Build a real model that counts up modulo ``VOCAB``, or goes round the tokens in another order.

    Tokens are points on a circle, and head ``h`` turns the trunk's state by ``hands[h - 1]`` of them: by ``h`` where
    all drafts shall be right.
    """
    size = len(order)
    with float64():
        trunk = TransformerTrunk(vocab_size=size, d_model=2, num_layers=1, num_heads=1, max_positions=128)
        model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=2, num_horizons=num_horizons))
    angles = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    with torch.no_grad():
        trunk.embedding.weight[list(order)] = torch.stack((angles.cos(), angles.sin()), dim=1)
        for name, parameter in trunk.layers.named_parameters():
            if name.rpartition(".")[0].endswith(("out", "down")):
                parameter.zero_()
        for linear, hand in zip(model.heads.maps, hands or range(1, num_horizons + 1), strict=True):
            turn = 2 * math.pi * hand / size
            linear.weight.copy_(torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]))
    return model.eval()
