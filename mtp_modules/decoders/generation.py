"""What decoders return, and the contract that they share."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import torch

from mtp_modules.core.checks import at_least, refuse, tokens_in_vocabulary
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.decoders.sampling import GREEDY, SamplingLaw
from mtp_modules.decoders.stopping import StopRule

_T = TypeVar("_T")


@runtime_checkable
class DecodableModel(Protocol):
    """What a decoder needs of a model; :class:`mtp_modules.MTPModel` is one."""

    trunk: Trunk
    heads: Heads
    unembedding: Unembedding


@dataclass(frozen=True)
class RoundLaws:
    """What a round's drafts were drawn from, and what they were verified by; kept where a decoder is told to.

    In greedy decoding nothing is drawn: the laws are then those at temperature 1 of the very logits that were compared.
    A draft that was looked up in the text has a point mass.

    Attributes:
        drafts: ``(B, K)``, all drafts of the round; row ``b`` is a row that took part, ``Round.drafted[b]`` count.
        draft_laws: ``(B, K, V)``, the law ``q`` of each draft.
        laws: ``(B, K + 1, V)``, the model's law ``p`` at the place of each draft, and after the last.
    """

    drafts: Int[Tensor, "B K"]
    draft_laws: Float[Tensor, "B K V"]
    laws: Float[Tensor, "B _ V"]


@dataclass(frozen=True)
class Round:
    """What one forward pass of the trunk brought.

    Attributes:
        rows: The prompts that took part.
        tokens: New tokens of each of them, cut where the row stops and at the budget.
        accepted: How many of those tokens were drafts; they come first, at depth 1, 2, ...; the model's own follows.
        drafted: How many tokens were drafted for each of them; 0 while reading the prompt.
        finish_reasons: ``"stop"``, ``"length"`` or ``"context"`` for a row that ends with this round, else ``None``.
        laws: Of the drafts and of the model, if the decoder keeps them, else ``None``.
    """

    rows: list[int]
    tokens: list[list[int]]
    accepted: list[int]
    drafted: list[int]
    finish_reasons: list[str | None]
    laws: RoundLaws | None = None

    @property
    def depths(self) -> list[list[int]]:
        """The depth at which each token was drafted, counted from 1; 0 for the model's own."""
        pairs = zip(self.tokens, self.accepted, strict=True)
        return [[place + 1 if place < accepted else 0 for place in range(len(new))] for new, accepted in pairs]


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
        most = max(done.drafted)
        missing = [0] * (most - len(self.drafted))
        self.drafted.extend(missing)
        self.accepted.extend(missing)
        for depth in range(most):
            self.drafted[depth] += sum(drafted > depth for drafted in done.drafted)
            self.accepted[depth] += sum(accepted > depth for accepted in done.accepted)


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
    laws: list[SamplingLaw]
    seeds: list[int]
    stops: list[StopRule]


def make_request(
    model: DecodableModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    stop: StopRule | Sequence[StopRule] | None,
    sampling: SamplingLaw | Sequence[SamplingLaw] | None,
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
        laws=_each("sampling", GREEDY if sampling is None else sampling, SamplingLaw, rows),
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
        sampling: SamplingLaw | Sequence[SamplingLaw] | None = None,
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
        sampling: SamplingLaw | Sequence[SamplingLaw] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Generation:
        """Decode to the end; see :meth:`stream` for the arguments."""
        started = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        stats = DecodingStats()
        streamed = self.stream(model, prompts, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling, seed=seed)
        for done in streamed:
            stats.count(done)
            for row, new, reason in zip(done.rows, done.tokens, done.finish_reasons, strict=True):
                tokens[row].extend(new)
                reasons[row] = reason or ""
        stats.seconds = time.perf_counter() - started
        return Generation(tokens, reasons, stats)
