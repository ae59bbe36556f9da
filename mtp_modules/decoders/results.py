"""What a round results in, and what rounds add up to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Array, Float, Int, Tensor
from mtp_modules.decoders.sampling.stopping import REASONS


class RoundResult(NamedTuple):
    """The result of a round, copied to the CPU.

    Attributes:
        tokens: New tokens of each row, of which the first ``counts[b]`` count.
        counts: One more than the accepted drafts.
        accepted: How many drafts were accepted.
        drafted: How many drafts counted.
    """

    tokens: Int[Array, "B C"]
    counts: Int[Array, " B"]
    accepted: Int[Array, " B"]
    drafted: Int[Array, " B"]


def pack_result(
    tokens: Int[Tensor, "B C"], accepted: Int[Tensor, " B"], drafted: Int[Tensor, " B"], scores: Float[Tensor, "B P V"]
) -> Int[Tensor, "B M"]:
    """Return the result of a round in one tensor, which one copy brings to the CPU: ``M = C + 3`` numbers a row.

    Args:
        tokens: New tokens, of which the accepted drafts and one more count.
        accepted: How many drafts were accepted.
        drafted: How many drafts counted.
        scores: What the tokens were chosen by; the last number says whether each position has a finite largest one.
    """
    finite = scores.amax(dim=-1).isfinite().all(dim=1, keepdim=True)
    return torch.cat((tokens, accepted[:, None], drafted[:, None], finite.long()), dim=1)


def emitted_of(packed: Int[Tensor, "B M"]) -> tuple[Int[Tensor, "B C"], Int[Tensor, " B"]]:
    """Return the new tokens of a packed result, and how many of them each row emits."""
    return packed[:, :-3], packed[:, -3] + 1


def depth_of(packed: Int[Tensor, "B M"]) -> int:
    """Return how many drafts one after the other a packed result is of."""
    return packed.shape[1] - 4


def unpack_result(packed: Int[Tensor, "B M"], rows: int) -> RoundResult:
    """Copy the result of a round to the CPU.

    Raises:
        ValueError: If a distribution of the model was not finite.
    """
    numbers = packed.cpu().numpy()[:rows].copy()
    if not numbers[:, -1].all():
        refuse(
            "generate",
            "the model's logits give no distribution (NaN, infinity, or minus infinity for every allowed token); check "
            "its weights, its precision and allowed_tokens.",
        )
    numbers.setflags(write=False)
    accepted = numbers[:, -3]
    return RoundResult(numbers[:, :-3], accepted + 1, accepted, numbers[:, -2])


@dataclass(frozen=True)
class RoundDistributions:
    """The distributions on both sides of a round's verification.

    In greedy decoding nothing is sampled: they are then those at temperature 1 of the very logits that were compared.
    The distribution of a draft that was looked up in the text is one-hot.

    Attributes:
        drafts: ``(B, K)``, all drafts of the round; row ``b`` is a row that took part, ``Round.drafted[b]`` count.
        draft_probs: ``(B, K, V)``, the distribution ``q`` of each draft.
        target_probs: ``(B, K + 1, V)``, the model's distribution ``p`` at the place of each draft, and after the last.
    """

    drafts: Int[Tensor, "B K"]
    draft_probs: Float[Tensor, "B K V"]
    target_probs: Float[Tensor, "B _ V"]


class RoundArrays(NamedTuple):
    """What one forward pass emitted in the rows that took part. Rounds share arrays: copy, then write.

    Attributes:
        rows: Their prompts.
        tokens: New tokens, of which the first ``counts[b]`` count.
        counts: How many; cut where the row stops and at the budget.
        accepted: How many of those were drafts.
        drafted: How many tokens were drafted.
        reasons: Why a row ends: 1 for ``"stop"``, 2 for ``"length"``, 3 for ``"context"``; 0 if it goes on.
    """

    rows: Int[Array, " B"]
    tokens: Int[Array, "B C"]
    counts: Int[Array, " B"]
    accepted: Int[Array, " B"]
    drafted: Int[Array, " B"]
    reasons: Int[Array, " B"]


@dataclass(frozen=True, eq=False)
class Round:
    """What one forward pass of the trunk emitted: arrays, and lists of the same, made when they are looked at.

    Attributes:
        arrays: One of everything for each row that took part.
        distributions: Of the drafts and of the model, if the decoder was asked for them, else ``None``.
    """

    arrays: RoundArrays
    distributions: RoundDistributions | None = None

    @cached_property
    def rows(self) -> list[int]:
        """The prompts that took part."""
        return self.arrays.rows.tolist()

    @cached_property
    def tokens(self) -> list[list[int]]:
        """New tokens of each of them, cut where the row stops and at the budget."""
        pairs = zip(self.arrays.tokens.tolist(), self.arrays.counts.tolist(), strict=True)
        return [new[:count] for new, count in pairs]

    @cached_property
    def accepted(self) -> list[int]:
        """How many of those tokens were drafts; they come first, at depth 1, 2, ...; the model's own follows."""
        return self.arrays.accepted.tolist()

    @cached_property
    def drafted(self) -> list[int]:
        """How many tokens were drafted for each of them; 0 while reading the prompt."""
        return self.arrays.drafted.tolist()

    @cached_property
    def finish_reasons(self) -> list[str | None]:
        """``"stop"``, ``"length"`` or ``"context"`` for a row that ends with this round, else ``None``."""
        return [REASONS[reason] for reason in self.arrays.reasons.tolist()]

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
        """Add a round."""
        self.count_arrays([done.arrays])

    def count_arrays(self, rounds: Sequence[RoundArrays]) -> None:
        """Add rounds, all at once."""
        if not rounds:
            return
        counts = np.concatenate([done.counts for done in rounds])
        self.tokens, self.forwards = self.tokens + int(counts.sum()), self.forwards + len(counts)
        drafted = _reaching(np.concatenate([done.drafted for done in rounds]))
        accepted = _reaching(np.concatenate([done.accepted for done in rounds]))
        self.drafted = [have + new for have, new in zip_longest(self.drafted, drafted, fillvalue=0)]
        accepted += [0] * (len(self.drafted) - len(accepted))
        self.accepted = [have + new for have, new in zip_longest(self.accepted, accepted, fillvalue=0)]


def _reaching(numbers: Int[Array, " N"]) -> list[int]:
    """Return how many of the numbers are above 0, above 1, and so on, up to the largest."""
    return np.bincount(numbers)[::-1].cumsum()[::-1][1:].tolist()


def by_prompt(rounds: Sequence[RoundArrays], num_prompts: int) -> tuple[list[list[int]], list[str]]:
    """Return all tokens of each prompt, and why it ends."""
    if not rounds:
        return [[] for _ in range(num_prompts)], [""] * num_prompts
    rows, counts, reasons = (
        np.concatenate(parts)
        for parts in zip(*((done.rows, done.counts, done.reasons) for done in rounds), strict=True)
    )
    widths = np.repeat([done.tokens.shape[1] for done in rounds], [len(done.rows) for done in rounds])
    places = np.arange(widths.sum()) - np.repeat(widths.cumsum() - widths, widths)
    tokens = np.concatenate([done.tokens.ravel() for done in rounds])[places < np.repeat(counts, widths)]
    tokens = tokens[np.repeat(rows, counts).argsort(kind="stable")]
    ends = np.bincount(rows, weights=counts, minlength=num_prompts).astype(np.int64).cumsum()[:-1]
    last = np.zeros(num_prompts, dtype=np.int64)
    last[rows[reasons > 0]] = reasons[reasons > 0]
    return [part.tolist() for part in np.split(tokens, ends)], [REASONS[reason] or "" for reason in last.tolist()]
