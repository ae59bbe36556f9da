"""What decoders return, and the contract that they share."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch

from mtp_modules.core.checks import at_least, refuse, tokens_in_vocabulary
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.decoders.rounds import DecodingStats, Round, by_prompt
from mtp_modules.decoders.sampling.parameters import GREEDY, SamplingParams
from mtp_modules.decoders.sampling.stopping import EndTable, StopRule

_T = TypeVar("_T")


@runtime_checkable
class DecodableModel(Protocol):
    """What a decoder needs of a model; :class:`mtp_modules.MTPModel` is one."""

    trunk: Trunk
    heads: Heads
    unembedding: Unembedding


@dataclass(frozen=True)
class Generation:
    """New tokens for every prompt.

    Attributes:
        tokens: New tokens of each prompt, without the prompt, with the tokens that stopped it.
        finish_reasons: ``"stop"`` (its stop rule), ``"length"`` (the budget) or ``"context"`` (no positions left).
        stats: Counts and time.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    stats: DecodingStats


@dataclass(frozen=True)
class Request:
    """What a decoder is asked for, one of everything a row.

    Attributes:
        prompts: Token ids.
        budgets: Most new tokens.
        laws: What tokens are drawn from.
        seeds: What they are drawn with.
        stops: When a row ends by its own words.
    """

    prompts: list[Sequence[int]]
    budgets: list[int]
    laws: list[SamplingParams]
    seeds: list[int]
    stops: list[StopRule]

    def ends(self, trunk: Trunk) -> EndTable:
        """Return where rows end. The trunk reads all tokens that a row emits, but the last.

        Args:
            trunk: That shall read them.
        """
        limit, room = trunk.max_positions, None
        if limit is not None:
            room = [limit - len(prompt) + 1 for prompt in self.prompts]
        return EndTable(self.budgets, room, self.stops, trunk.vocab_size)


def make_request(
    model: DecodableModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    stop: StopRule | Sequence[StopRule] | None,
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    seed: int | Sequence[int],
) -> Request:
    """Check what a user asks for, and give every row its own of everything.

    Args:
        model: Trunk, heads and unembedding.
        prompts: Token ids, of any lengths.
        max_new_tokens: Budget of all rows, or of each.
        stop: Stop rule of all rows, or of each.
        sampling: Law of all rows, or of each.
        seed: Of the first row, the next ones count on; or of each.

    Raises:
        ValueError: If a prompt is empty, too long, or holds a token outside the vocabulary, or a list has not one item
            a prompt.
    """
    if not prompts:
        refuse("generate", "prompts is empty; give at least one.")
    limit = model.trunk.max_positions
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            refuse("generate", f"prompt {row} is empty; give at least one token.")
        if limit is not None and len(prompt) > limit:
            refuse(
                "generate",
                f"prompt {row} has {len(prompt)} tokens, the trunk reads at most max_positions={limit}; "
                "shorten the prompt.",
            )
        tokens_in_vocabulary("generate", torch.as_tensor(prompt), model.trunk.vocab_size)
    rows = len(prompts)
    budgets = _each("max_new_tokens", max_new_tokens, int, rows)
    for budget in budgets:
        at_least("generate", "max_new_tokens", budget, 1)
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else _each("seed", seed, int, rows)
    return Request(
        prompts=list(prompts),
        budgets=budgets,
        laws=_each("sampling", GREEDY if sampling is None else sampling, SamplingParams, rows),
        seeds=seeds,
        stops=_each("stop", StopRule() if stop is None else stop, StopRule, rows),
    )


def _each(name: str, given: _T | Sequence[_T], kind: type[_T], rows: int) -> list[_T]:
    if isinstance(given, kind):
        return [given] * rows
    values: list[_T] = list(given)  # type: ignore[arg-type]  # what is not one of them is a sequence of them
    if len(values) != rows:
        refuse("generate", f"{name} holds {len(values)} items for {rows} prompts; give one, or one a prompt.")
    return values


class Decoder(Component, ABC):
    """Continues prompts. Never changes the model."""

    @abstractmethod
    def stream(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop: StopRule | Sequence[StopRule] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[Round]:
        """Yield new tokens as forward passes bring them; stop iterating to cancel.

        A row's output depends on its own prompt, law, seed and stop rule, never on its neighbours.

        Args:
            model: Trunk, heads and unembedding.
            prompts: Token ids, of any lengths.
            max_new_tokens: Budget of every prompt, or of each.
            stop: When a row ends by its own words, for all or for each; by the budget alone if ``None``.
            sampling: The law that tokens are drawn from, for all or for each; the likeliest token if ``None``.
            seed: Seed of the first row, the next ones count on; or of each.

        Raises:
            ValueError: If a prompt is empty, too long, or holds a token outside the vocabulary, a list has not one item
                a prompt, or the model's logits are not numbers.
        """

    def generate(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop: StopRule | Sequence[StopRule] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Generation:
        """Decode to the end; see :meth:`stream` for the arguments."""
        started = time.perf_counter()
        streamed = self.stream(model, prompts, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling, seed=seed)
        rounds = [done.arrays for done in streamed]
        stats = DecodingStats()
        stats.count_arrays(rounds)
        tokens, reasons = by_prompt(rounds, len(prompts))
        stats.seconds = time.perf_counter() - started
        return Generation(tokens, reasons, stats)
