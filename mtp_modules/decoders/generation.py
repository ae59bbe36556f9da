"""What decoders return, and the contract that they share."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.unembedding import Unembedding


@runtime_checkable
class DecodableModel(Protocol):
    """What a decoder needs of a model; :class:`mtp_modules.MTPModel` is one."""

    trunk: Trunk
    heads: Heads
    unembedding: Unembedding


@dataclass(frozen=True)
class Round:
    """What one forward pass of the trunk brought.

    Attributes:
        rows: The prompts that took part.
        tokens: New tokens of each of them, cut at a stop token and at the budget.
        accepted: How many of those tokens were drafts; they come first, at depth 1, 2, ...; the model's own follows.
        drafted: How many tokens were drafted for each row; 0 while reading the prompt.
        finish_reasons: ``"stop"``, ``"length"`` or ``"context"`` for a row that ends with this round, else ``None``.
    """

    rows: list[int]
    tokens: list[list[int]]
    accepted: list[int]
    drafted: int
    finish_reasons: list[str | None]


@dataclass
class DecodingStats:
    """Counts over all rows of a run.

    Attributes:
        tokens: New tokens.
        forwards: Forward passes of the trunk, counted once for every row that took part; the prompt's pass is one.
        drafted: Drafted tokens at each depth, nearest first.
        accepted: Accepted drafts at each depth.
        seconds: Wall-clock time.
    """

    tokens: int = 0
    forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of a row for each forward pass it took part in; 1 for plain decoding."""
        return self.tokens / max(self.forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts at each depth that were accepted."""
        return [kept / max(made, 1) for kept, made in zip(self.accepted, self.drafted, strict=True)]

    def count(self, done: Round) -> None:
        """Add a round.

        Args:
            done: What the decoder has just yielded.
        """
        self.tokens += sum(len(tokens) for tokens in done.tokens)
        self.forwards += len(done.rows)
        missing = [0] * (done.drafted - len(self.drafted))
        self.drafted.extend(missing)
        self.accepted.extend(missing)
        for depth in range(done.drafted):
            self.drafted[depth] += len(done.rows)
            self.accepted[depth] += sum(accepted > depth for accepted in done.accepted)


@dataclass(frozen=True)
class Generation:
    """New tokens for every prompt.

    Attributes:
        tokens: New tokens of each prompt, without the prompt, with the stop token if one ended it.
        finish_reasons: ``"stop"`` (a stop token), ``"length"`` (the budget) or ``"context"`` (no positions left).
        stats: Counts and time.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    stats: DecodingStats


class Decoder(Component, ABC):
    """Continues prompts. Never changes the model."""

    @abstractmethod
    def stream(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
    ) -> Iterator[Round]:
        """Yield new tokens as forward passes bring them; stop iterating to cancel.

        Args:
            model: Trunk, heads and unembedding.
            prompts: Token ids, of any lengths.
            max_new_tokens: Budget of each prompt.
            stop_tokens: A row ends with the first of these that it emits.

        Raises:
            ValueError: If a prompt is empty, too long, or holds a token outside the vocabulary.
        """

    def generate(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
    ) -> Generation:
        """Decode to the end; see :meth:`stream` for the arguments."""
        started = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        stats = DecodingStats()
        for done in self.stream(model, prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens):
            stats.count(done)
            for row, new, reason in zip(done.rows, done.tokens, done.finish_reasons, strict=True):
                tokens[row].extend(new)
                reasons[row] = reason or ""
        stats.seconds = time.perf_counter() - started
        return Generation(tokens, reasons, stats)
