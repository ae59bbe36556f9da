"""Hypotheses of all prompts of a beam search, as arrays, and the rule that says which of them go on."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mtp_modules.core.shapes import Array, Bool, Float, Int, Shaped
from mtp_modules.decoders.sampling.stopping import GOES_ON, REASONS, STOP, EndTable, StopRule, matchers_of

RESOLUTION = 2.0**30
"""Scores are compared in steps of ``1 / RESOLUTION``: equal laws come out of chunks of unequal lengths a few roundings
apart, and what is a tie in one must be a tie in the other."""

ABSENT = -1
"""In the place of a reason: no such hypothesis, for fewer texts are possible."""

_LONGER_THAN_ANY = 1 << 62
_NO_TOKEN = -1  # before all tokens where scores tie


@dataclass(frozen=True)
class BeamPlan:
    """How a beam search goes.

    Attributes:
        num_beams: How many hypotheses of a prompt go on.
        length_penalty: Exponent of the length that a log-probability is divided by.
        num_drafts: Most drafts one after the other; 0 for none.
        num_paths: Drafted paths of a prompt that are followed at each depth.
        whole_blocks: Choose among drafted blocks only, whole ones, instead of among all tokens step by step.
    """

    num_beams: int
    length_penalty: float
    num_drafts: int = 0
    num_paths: int = 1
    whole_blocks: bool = False


@dataclass(frozen=True)
class Beam:
    """A hypothesis that a search ended with.

    Attributes:
        tokens: New tokens, with those that stopped it.
        log_probability: Of all of them, by the model's own law.
        score: What it is ranked by: the log-probability over ``len(tokens) ** length_penalty``.
        finish_reason: See :class:`~mtp_modules.decoders.Generation`.
    """

    tokens: list[int]
    log_probability: float
    score: float
    finish_reason: str


class Hypotheses(NamedTuple):
    """The texts that a search follows, up to ``W`` a prompt, best first. Arrays may be shared: copy, then write.

    Attributes:
        tokens: New tokens, of which the first ``lengths[b, w]`` count.
        lengths: How many.
        log_probabilities: Of all of them, by the model's own law.
        reasons: Place in :data:`REASONS` of why it ends; :data:`ABSENT` where there is none.
        rows: Row of the decoding states in which its text up to the last token lies.
        matchers: What has seen all its tokens; looked at in prompts that have to be watched.
    """

    tokens: Int[Array, "B W N"]
    lengths: Int[Array, "B W"]
    log_probabilities: Float[Array, "B W"]
    reasons: Int[Array, "B W"]
    rows: Int[Array, "B W"]
    matchers: Shaped[Array, "B W"]

    @classmethod
    def empty(cls, rules: list[StopRule], prompts: Sequence[Sequence[int]] | None = None) -> "Hypotheses":
        """Return the empty text for every prompt.

        Args:
            rules: One a prompt.
            prompts: Which; ``None`` if nobody knows.
        """
        zeros = np.zeros((len(rules), 1), dtype=np.int64)
        matchers = np.empty((len(rules), 1), dtype=object)
        matchers[:, 0] = matchers_of(rules, prompts)
        return cls(zeros[:, :, None], zeros, np.zeros((len(rules), 1)), zeros, zeros, matchers)

    @property
    def going_on(self) -> Bool[Array, "B W"]:
        """Which are not finished."""
        return self.reasons == GOES_ON

    def at(self, *index: Any) -> "Hypotheses":
        """Return some of them.

        Args:
            index: Of arrays over prompts and hypotheses.
        """
        return Hypotheses(*(part[index] for part in self))

    def where(self, chosen: Bool[Array, " B"], others: "Hypotheses") -> "Hypotheses":
        """Return these for some prompts, and others for the rest.

        Args:
            chosen: The prompts with these.
            others: As many a prompt, with texts of the same size.
        """
        columns = (chosen.reshape(-1, *[1] * (part.ndim - 1)) for part in self)
        return Hypotheses(*map(np.where, columns, self, others))

    def beside(self, others: "Hypotheses") -> "Hypotheses":
        """Return these and, behind them, others of the same prompts.

        Args:
            others: With texts of the same size.
        """
        return Hypotheses(*(np.concatenate(parts, axis=1) for parts in zip(self, others, strict=True)))

    def with_room(self, count: int) -> "Hypotheses":
        """Return the same, with room for texts of at least so many tokens; what is too small grows to twice that.

        Args:
            count: How many.
        """
        size = self.tokens.shape[2]
        if count <= size:
            return self
        return self._replace(tokens=np.pad(self.tokens, ((0, 0), (0, 0), (0, 2 * count - size))))

    def last(self) -> Int[Array, "B W"]:
        """Return the last token of each; of no use for an empty text."""
        count, width, size = self.tokens.shape
        ends = self.lengths - 1 + size * np.arange(count * width).reshape(count, width)
        return self.tokens.reshape(-1)[ends]

    def agreed(self, since: int) -> Int[Array, " B"]:
        """Return how many first tokens all hypotheses of a prompt share.

        Args:
            since: So many are known to be the same.
        """
        absent = self.reasons == ABSENT
        tokens = self.tokens[:, :, since : int(self.lengths.max())]
        same = ((tokens == tokens[:, :1]) | absent[:, :, None]).all(axis=1)
        shortest = np.where(absent, _LONGER_THAN_ANY, self.lengths).min(axis=1)
        return np.minimum(since + np.logical_and.accumulate(same, axis=1).sum(axis=1), shortest)

    def beams(self, scales: "LengthScales") -> list[list[Beam]]:
        """Return them one by one; to be called when all have ended.

        Args:
            scales: Of the search.
        """
        scores = self.log_probabilities / scales(self.lengths)
        parts = (self.tokens, self.lengths, self.log_probabilities, scores, self.reasons)
        return [
            [
                Beam(text[:length], log_probability, score, REASONS[reason] or "")
                for text, length, log_probability, score, reason in zip(*of_prompt, strict=True)
                if reason != ABSENT
            ]
            for of_prompt in zip(*(part.tolist() for part in parts), strict=True)
        ]


class LengthScales:
    """What the log-probability of so many tokens is divided by; a table, so that equal lengths have equal scales.

    Args:
        length_penalty: Exponent.
    """

    def __init__(self, length_penalty: float) -> None:
        self._length_penalty = length_penalty
        self._table = np.ones(1)

    def __call__(self, lengths: Int[Array, " *N"]) -> Float[Array, " *N"]:
        """Return the scale of every length.

        Args:
            lengths: At least 0.
        """
        try:
            return self._table[lengths]
        except IndexError:  # a longer one than ever
            self._table = np.array([1.0, *map(self._scale, range(1, 2 * int(lengths.max())))])
            return self._table[lengths]

    def _scale(self, length: int) -> float:
        try:
            return float(length**self._length_penalty)
        except OverflowError:
            return sys.float_info.max  # not infinity: what is impossible must not become a number that is none


class BeamRule:
    """How the hypotheses of a prompt are compared, and when they end.

    Args:
        plan: How to search.
        ends: Where texts end, a row a prompt.
    """

    def __init__(self, plan: BeamPlan, ends: EndTable) -> None:
        self.num_beams, self.ends, self.scales = plan.num_beams, ends, LengthScales(plan.length_penalty)

    def select(self, rows: Int[Array, " N"]) -> None:
        """Go on with some of the prompts only.

        Args:
            rows: Which, in their new order.
        """
        self.ends.select(rows)

    def best(
        self,
        hypotheses: Hypotheses,
        rows: Int[Array, "B W"],
        tokens: Int[Array, "B W k"],
        log_probabilities: Float[Array, "B W k"],
        stepping: Bool[Array, " B"],
    ) -> tuple[Hypotheses, Int[Array, "B _"], Int[Array, "B _"]]:
        """Return the best of the finished hypotheses and of what may follow the others, best first.

        Args:
            hypotheses: Older ones first where scores tie; with room for one token more.
            rows: In which each of them lies now, up to its last token.
            tokens: At least ``num_beams`` best continuations of each; of no use for a finished one.
            log_probabilities: Of the hypotheses with them.
            stepping: For which prompts the result is wanted.

        Returns:
            The hypotheses; which one each was; its last token, negative where it was finished before.
        """
        finished = hypotheses.reasons > GOES_ON
        going_on = hypotheses.going_on[:, :, None]
        log_probabilities = np.where(going_on, log_probabilities, -np.inf)
        log_probabilities[:, :, 0] = np.where(finished, hypotheses.log_probabilities, log_probabilities[:, :, 0])
        tokens = np.where(going_on, tokens, _NO_TOKEN)
        scales = self.scales(hypotheses.lengths + ~finished)[:, :, None]
        ranks = np.rint(log_probabilities / scales * RESOLUTION)
        count, width = len(tokens), tokens.shape[2]
        ranks, tokens, log_probabilities = (part.reshape(count, -1) for part in (ranks, tokens, log_probabilities))
        # What is left of a tie goes by the place, so by the older hypothesis: the sort is stable.
        order = np.lexsort((tokens, -ranks), axis=1)[:, : self.num_beams]
        prompts, parents = np.arange(count)[:, None], order // width
        new = tokens[prompts, order]
        best = hypotheses.at(prompts, parents)
        best = best._replace(rows=rows[prompts, parents], log_probabilities=log_probabilities[prompts, order])
        return self._grown(best, new, stepping), parents, new

    def _grown(self, hypotheses: Hypotheses, new: Int[Array, "B W"], stepping: Bool[Array, " B"]) -> Hypotheses:
        """Return hypotheses with one token more, where there is one; writes into their arrays: none may be shared."""
        possible, grows = hypotheses.log_probabilities > -np.inf, new != _NO_TOKEN
        tokens, lengths, matchers = hypotheses.tokens, hypotheses.lengths + grows, hypotheses.matchers
        prompt, place = np.nonzero(grows)
        tokens[prompt, place, lengths[prompt, place] - 1] = new[prompt, place]
        reasons = np.where(lengths == self.ends.most[:, None], self.ends.at_most[:, None], GOES_ON)
        if self.ends.has_stops:
            reasons[self.ends.stops(new)] = STOP
        if self.ends.any_watched:
            watched = self.ends.watched & stepping
            for at in map(tuple, np.argwhere(watched[:, None] & grows & possible).tolist()):
                matchers[at] = copy.copy(matchers[at])
                if matchers[at].ends(int(new[at])):
                    reasons[at] = STOP
        reasons = np.where(grows, reasons, hypotheses.reasons)
        reasons[~possible] = ABSENT
        return hypotheses._replace(lengths=lengths, reasons=reasons)
