"""Hypotheses of all prompts of a beam search as arrays, and the step that keeps the best of their continuations."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mtp_modules.core.shapes import Array, Bool, Float, Int, Shaped
from mtp_modules.decoders.sampling.stopping import GOES_ON, REASONS, STOP, EndTable, StopRule, matchers_of

RESOLUTION = 2.0**30
"""Scores are compared in steps of ``1 / RESOLUTION``: chunks of unequal lengths give equal distributions that differ by
a few roundings, and what is a tie in one must be a tie in the other."""

ABSENT = -1
"""In the place of a reason: no such hypothesis, for fewer texts are possible."""

NO_TOKEN = -1
"""In the place of the next token of a finished hypothesis; it comes before all tokens where scores tie."""

NO_LIMIT = 1 << 62
"""More tokens than any text has."""


@dataclass(frozen=True)
class BeamPlan:
    """How a beam search goes.

    Attributes:
        num_beams: How many hypotheses of a prompt are kept.
        length_penalty: Exponent of the length that a log-probability is divided by.
        num_drafts: Most drafts one after the other; 0 for none.
        num_paths: Drafted paths of a prompt that are kept at each depth.
        whole_blocks: Choose among whole drafted blocks only, instead of among all tokens step by step.
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
        log_probability: Of all of them, under the model's own distribution.
        score: What it is ranked by: the log-probability over ``len(tokens) ** length_penalty``.
        finish_reason: See :class:`~mtp_modules.decoders.Generation`.
    """

    tokens: list[int]
    log_probability: float
    score: float
    finish_reason: str


class Hypotheses(NamedTuple):
    """The hypotheses of a search, up to ``W`` a prompt, best first. Arrays may be shared: copy, then write.

    Attributes:
        tokens: New tokens, of which the first ``lengths[b, w]`` count.
        lengths: How many.
        log_probabilities: Of all of them, under the model's own distribution.
        reasons: Place in :data:`REASONS` of why it ends; :data:`ABSENT` where there is none.
        rows: Row of the decoding states that holds its text up to the last token.
        nodes: Its slot in the draft tree, at the depth that the search has come to; -1 if it is not there.
        matchers: What has seen all its tokens; looked at in prompts that have to be watched.
    """

    tokens: Int[Array, "B W N"]
    lengths: Int[Array, "B W"]
    log_probabilities: Float[Array, "B W"]
    reasons: Int[Array, "B W"]
    rows: Int[Array, "B W"]
    nodes: Int[Array, "B W"]
    matchers: Shaped[Array, "B W"]

    @classmethod
    def empty(cls, rules: list[StopRule], prompts: Sequence[Sequence[int]] | None = None) -> "Hypotheses":
        """Return the empty text for every prompt.

        Args:
            rules: One a prompt.
            prompts: Which; ``None`` if unknown.
        """
        zeros = np.zeros((len(rules), 1), dtype=np.int64)
        matchers = np.empty((len(rules), 1), dtype=object)
        matchers[:, 0] = matchers_of(rules, prompts)
        return cls(zeros[:, :, None], zeros, zeros.astype(np.float64), zeros, zeros, zeros, matchers)

    @property
    def going_on(self) -> Bool[Array, "B W"]:
        """Which are not finished."""
        return self.reasons == GOES_ON

    @property
    def numbers(self) -> Int[Array, "B W"]:
        """The place of each unfinished one among those of all prompts; of no use for the others."""
        return np.cumsum(self.going_on).reshape(self.reasons.shape) - 1

    def at(self, *index: Any) -> "Hypotheses":
        """Return the hypotheses at an index into the axes of prompts and hypotheses."""
        return Hypotheses(*(part[index] for part in self))

    def where(self, chosen: Bool[Array, " B"], others: "Hypotheses") -> "Hypotheses":
        """Return these hypotheses for the chosen prompts, and the others, as many, for the rest."""
        columns = (chosen.reshape(-1, *[1] * (part.ndim - 1)) for part in self)
        return Hypotheses(*map(np.where, columns, self, others))

    def beside(self, others: "Hypotheses") -> "Hypotheses":
        """Return these hypotheses and, behind them, others of the same prompts."""
        return Hypotheses(*(np.concatenate(parts, axis=1) for parts in zip(self, others, strict=True)))

    def with_room(self, count: int) -> "Hypotheses":
        """Return the same, with room for texts of at least ``count`` tokens; what is too small grows to twice that."""
        size = self.tokens.shape[2]
        if count <= size:
            return self
        return self._replace(tokens=np.pad(self.tokens, ((0, 0), (0, 0), (0, 2 * count - size))))

    def last(self) -> Int[Array, "B W"]:
        """Return the last token of each; of no use for an empty text."""
        count, width = self.lengths.shape
        return self.tokens[np.arange(count)[:, None], np.arange(width), self.lengths - 1]

    def agreed(self, since: int) -> Int[Array, " B"]:
        """Return how many first tokens all hypotheses of a prompt share; ``since`` of them are known to be the same."""
        absent = self.reasons == ABSENT
        tokens = self.tokens[:, :, since : int(self.lengths.max())]
        same = ((tokens == tokens[:, :1]) | absent[:, :, None]).all(axis=1)
        shortest = np.where(absent, NO_LIMIT, self.lengths).min(axis=1)
        return np.minimum(since + np.logical_and.accumulate(same, axis=1).sum(axis=1), shortest)

    def beams(self, length_penalty: float) -> list[list[Beam]]:
        """Return them one by one; to be called when all have ended."""
        scores = self.log_probabilities / length_scales(self.lengths, length_penalty)
        parts = (self.tokens, self.lengths, self.log_probabilities, scores, self.reasons)
        return [
            [
                Beam(text[:length], log_probability, score, REASONS[reason] or "")
                for text, length, log_probability, score, reason in zip(*of_prompt, strict=True)
                if reason != ABSENT
            ]
            for of_prompt in zip(*(part.tolist() for part in parts), strict=True)
        ]


def length_scales(lengths: Int[Array, " *N"], length_penalty: float) -> Float[Array, " *N"]:
    """Return ``length ** length_penalty``, which log-probabilities are divided by; the lengths are at least 1."""
    with np.errstate(over="ignore"):
        scales = lengths ** float(length_penalty)
    return np.minimum(scales, sys.float_info.max)  # not infinity: the score of an impossible text must not become NaN


class BeamRule:
    """How the hypotheses of a prompt are ranked, and when they end: ``ends`` has a row a prompt."""

    def __init__(self, plan: BeamPlan, ends: EndTable) -> None:
        self.num_beams, self.length_penalty, self.ends = plan.num_beams, plan.length_penalty, ends

    def best(
        self,
        hypotheses: Hypotheses,
        tokens: Int[Array, "B W k"],
        log_probabilities: Float[Array, "B W k"],
        stepping: Bool[Array, " B"],
    ) -> Hypotheses:
        """Return the best of the finished hypotheses and of all continuations of the others, best first.

        Args:
            hypotheses: Older ones first where scores tie; with room for one token more.
            tokens: At least ``num_beams`` best next tokens of each; of no use for a finished one.
            log_probabilities: Of the hypotheses with them.
            stepping: For which prompts the result is wanted.
        """
        finished = hypotheses.reasons > GOES_ON
        grows = (hypotheses.going_on & stepping[:, None])[:, :, None]
        log_probabilities = np.where(grows, log_probabilities, -np.inf)
        log_probabilities[:, :, 0] = np.where(finished, hypotheses.log_probabilities, log_probabilities[:, :, 0])
        tokens = np.where(grows, tokens, NO_TOKEN)
        scales = length_scales(hypotheses.lengths + ~finished, self.length_penalty)[:, :, None]
        ranks = np.rint(log_probabilities / scales * RESOLUTION)
        count, width = len(tokens), tokens.shape[2]
        ranks, tokens, log_probabilities = (part.reshape(count, -1) for part in (ranks, tokens, log_probabilities))
        # The sort is stable, so what is left of a tie goes to the older hypothesis.
        order = np.lexsort((tokens, -ranks), axis=1)[:, : self.num_beams]
        prompts, parents = np.arange(count)[:, None], order // width
        best = hypotheses.at(prompts, parents)._replace(log_probabilities=log_probabilities[prompts, order])
        return self.grown(best, tokens[prompts, order])

    def grown(self, hypotheses: Hypotheses, new: Int[Array, "B W"]) -> Hypotheses:
        """Return the hypotheses with a new token each, unless it is ``NO_TOKEN``, and finished where that ends them.

        Writes into the arrays of the hypotheses.
        """
        possible, grows = hypotheses.log_probabilities > -np.inf, new != NO_TOKEN
        tokens, lengths, matchers = hypotheses.tokens, hypotheses.lengths + grows, hypotheses.matchers
        prompt, place = np.nonzero(grows)
        tokens[prompt, place, lengths[prompt, place] - 1] = new[prompt, place]
        reasons = np.where(lengths == self.ends.most[:, None], self.ends.at_most[:, None], GOES_ON)
        if self.ends.has_stops:
            reasons[self.ends.stops(new)] = STOP
        if self.ends.any_watched:  # for strings; tokenizers take one text at a time
            for at in map(tuple, np.argwhere(self.ends.watched[:, None] & grows & possible).tolist()):
                matchers[at] = copy.copy(matchers[at])
                if matchers[at].ends(int(new[at])):
                    reasons[at] = STOP
        reasons = np.where(grows, reasons, hypotheses.reasons)
        reasons[~possible] = ABSENT
        return hypotheses._replace(lengths=lengths, reasons=reasons)
