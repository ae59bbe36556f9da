"""Hypotheses of a beam search, and the rule that says which of them go on. Plain Python, no tensors."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mtp_modules.decoders.stopping import StopMatcher

RESOLUTION = 2.0**30
"""Scores are compared in steps of ``1 / RESOLUTION``: equal laws come out of chunks of unequal lengths a few roundings
apart, and what is a tie in one must be a tie in the other."""


class Continuation(NamedTuple):
    """A token that may follow a hypothesis.

    Attributes:
        token: Its id.
        log_probability: Of the hypothesis with it.
    """

    token: int
    log_probability: float


class Hypothesis(NamedTuple):
    """A text that a search follows.

    Attributes:
        tokens: New tokens.
        log_probability: Of all of them, by the model's own law.
        matcher: Has seen all of them.
        row: Row of the decoding states in which its text up to the last token lies.
        finish_reason: Why it ends, or ``None`` if it goes on.
    """

    tokens: tuple[int, ...]
    log_probability: float
    matcher: StopMatcher
    row: int
    finish_reason: str | None = None


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
class BeamRule:
    """How the hypotheses of one prompt are compared, and when they end.

    Attributes:
        num_beams: How many go on.
        length_penalty: Exponent of the length that a log-probability is divided by.
        most: Longest hypothesis.
        most_reason: Why it ends there.
    """

    num_beams: int
    length_penalty: float
    most: int
    most_reason: str

    def score(self, log_probability: float, length: int) -> float:
        """Return what a hypothesis is ranked by.

        Args:
            log_probability: Of all its tokens.
            length: How many they are, at least 1.
        """
        return log_probability / length_scale(length, self.length_penalty)

    def grow(self, hypothesis: Hypothesis, step: Continuation) -> Hypothesis:
        """Return the hypothesis with one token more.

        Args:
            hypothesis: One that goes on.
            step: The token.
        """
        matcher = copy.copy(hypothesis.matcher)
        tokens = (*hypothesis.tokens, step.token)
        reason = self.most_reason if len(tokens) == self.most else None
        reason = "stop" if matcher.ends(step.token) else reason
        return Hypothesis(tokens, step.log_probability, matcher, hypothesis.row, reason)

    def best(self, hypotheses: Sequence[Hypothesis], following: Sequence[Sequence[Continuation]]) -> list[Hypothesis]:
        """Return the best of the finished hypotheses and of what may follow the others, best first.

        Args:
            hypotheses: Older ones first.
            following: For each of them, at least its ``num_beams`` best continuations; of no use for a finished one.
        """
        candidates: list[tuple[int, int, int, Continuation | None]] = []
        for index, (hypothesis, steps) in enumerate(zip(hypotheses, following, strict=True)):
            length = len(hypothesis.tokens)
            if hypothesis.finish_reason is not None:
                candidates.append((-self._rank(hypothesis.log_probability, length), -1, index, None))
                continue
            for step in steps:
                if step.log_probability > -float("inf"):
                    candidates.append((-self._rank(step.log_probability, length + 1), step.token, index, step))
        candidates.sort(key=lambda candidate: candidate[:3])
        return [
            hypotheses[index] if step is None else self.grow(hypotheses[index], step)
            for _, _, index, step in candidates[: self.num_beams]
        ]

    def _rank(self, log_probability: float, length: int) -> int:
        return round(self.score(log_probability, length) * RESOLUTION)


def length_scale(length: int, length_penalty: float) -> float:
    """Return what the log-probability of so many tokens is divided by.

    Args:
        length: How many tokens.
        length_penalty: Exponent.
    """
    return float(length**length_penalty)


def agreed(hypotheses: Sequence[Hypothesis]) -> int:
    """Return how many first tokens all hypotheses share.

    Args:
        hypotheses: At least one.
    """
    columns = zip(*(hypothesis.tokens for hypothesis in hypotheses), strict=False)
    for count, column in enumerate(columns):
        if len(set(column)) > 1:
            return count
    return min(len(hypothesis.tokens) for hypothesis in hypotheses)
