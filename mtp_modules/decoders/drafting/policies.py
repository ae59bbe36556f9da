"""How many tokens to draft in a round."""

import math
import time
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Heads
from mtp_modules.core.shapes import Bool, Float, Tensor


class DepthChooser:
    """The state of a policy in one run. This one always drafts as many tokens as it may.

    Args:
        most: Most drafts of a round.

    Attributes:
        watches: Whether it ends rows by the confidence in their drafts.
        predicted: Whether that is the acceptance that the heads predict, not the drafts' own probability.
    """

    watches: bool = False
    predicted: bool = False

    def __init__(self, most: int) -> None:
        self.most = most

    def depth(self, rows: int) -> int:
        """Return how many tokens to draft in the next round."""
        return self.most

    def goes_on(self, confidence: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Return which rows draft another token.

        Args:
            confidence: Probability, by the drafter's own distributions, of all drafts of the row so far; or, if
                ``predicted``, that all of them and the next will be accepted. The decision rests on nothing else: one
                that knew the model's distribution would bias the output.
        """
        return torch.ones_like(confidence, dtype=torch.bool)

    def learn(self, rows: int, drafted: int, accepted: npt.ArrayLike, limits: npt.ArrayLike, seconds: float) -> None:
        """Update by a round that is over.

        Args:
            rows: How many rows took part.
            drafted: How many tokens were drafted.
            accepted: How many drafts of each row were accepted, an array.
            limits: How many of each row's drafts counted, an array.
            seconds: How long the round took.
        """


class DraftPolicy(Component, ABC):
    """Decides how many tokens are drafted."""

    @abstractmethod
    def start(self, most: int) -> DepthChooser:
        """Begin a run."""

    def depths(self, most: int) -> list[int]:
        """Return which numbers of drafts rounds will be given."""
        return [most]

    def check(self, heads: Heads) -> None:
        """Reject heads that this policy cannot go by.

        Args:
            heads: Of the model.

        Raises:
            ValueError: If it cannot.
        """
        return


class FixedDepth(DraftPolicy):
    """Draft as many tokens as the decoder allows, in every round."""

    def start(self, most: int) -> DepthChooser:
        """Begin a run."""
        return DepthChooser(most)


class ConfidentDepth(DraftPolicy):
    """Stop drafting a row once the joint probability of its drafts, by the drafter's own distributions, is too low.

    The draft that fell below is still verified: leaving out a token because of what it is would bias the output.

    With ``predicted``, the heads say how likely each draft is accepted (:class:`~mtp_modules.ConfidenceHeads`), before
    they sample it. Drafting stops in front of the draft that would take the product below the threshold; it is not
    verified, because nothing of it has been looked at.

    Args:
        threshold: Probability below which no further token is drafted.
        predicted: Go by the acceptance that the heads predict.

    Raises:
        ValueError: If the threshold lies outside [0, 1]; when decoding, if the heads predict no acceptance.
    """

    def __init__(self, *, threshold: float = 0.2, predicted: bool = False) -> None:
        if not 0 <= threshold <= 1:
            refuse(self, f"threshold must lie in [0, 1], got {threshold}.")
        self.threshold, self.predicted = threshold, predicted

    def check(self, heads: Heads) -> None:
        """Reject heads that predict no acceptance, if this policy goes by it."""
        if self.predicted and not heads.predicts_acceptance:
            refuse(
                self,
                f"predicted is true, but {type(heads).__name__} predict no acceptance; train "
                f"ConfidenceHeads(heads={type(heads).__name__}(...)), or leave it out.",
            )

    def depths(self, most: int) -> list[int]:
        """Return all numbers of drafts: a round ends as soon as no row wants another."""
        return list(range(0 if self.predicted else 1, most + 1))

    def start(self, most: int) -> DepthChooser:
        """Begin a run."""
        return _ByConfidence(most, self.threshold, self.predicted)


class _ByConfidence(DepthChooser):
    watches = True

    def __init__(self, most: int, threshold: float, predicted: bool) -> None:
        super().__init__(most)
        self.threshold, self.predicted = threshold, predicted

    def goes_on(self, confidence: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
        return confidence >= self.threshold


class CostAwareDepth(DraftPolicy):
    """Draft the number of tokens that emits the most tokens a second, by the time and the acceptance of past rounds.

    Measures the time of rounds with each number of drafts and the acceptance at each depth, as running averages, and
    takes the number with the best ratio. No drafts at all is one of the choices, so decoding does not stay slower than
    plain where drafting does not pay. A few rounds are spent on numbers that have not been tried for long. As rows end,
    times of rounds with more rows are what rounds with fewer are first compared by, and a run begins with what the last
    one has learned; so keep the decoder for the next text.

    The choice rests on time and on past rounds, so it does not bias the output; but it is not reproducible, and with an
    acceptance other than :class:`~mtp_modules.decoders.ExactMatch` neither is the sample.

    Args:
        memory: Share of the past that a running average keeps with each round since.
        explore_every: Rounds between two tries of a number that is not the best.

    Raises:
        ValueError: If ``memory`` is not in [0, 1), or ``explore_every`` is below 2.
    """

    def __init__(self, *, memory: float = 0.9, explore_every: int = 32) -> None:
        if not 0 <= memory < 1:
            refuse(self, f"memory must lie in [0, 1), got {memory}.")
        at_least(self, "explore_every", explore_every, 2)
        self.memory, self.explore_every = memory, explore_every
        self._last: dict[int, _ByCost] = {}

    def start(self, most: int) -> DepthChooser:
        """Begin a run."""
        self._last[most] = _ByCost(self.depths(most), self.memory, self.explore_every, self._last.get(most))
        return self._last[most]

    def depths(self, most: int) -> list[int]:
        """Return 0, powers of 2, and ``most``."""
        return sorted({0, most, *(2**power for power in range(most.bit_length()) if 2**power < most)})


class _ByCost(DepthChooser):
    """Running averages of one run; those of times are kept for each number of rows.

    Only their ratios matter. So a new number of rows begins with the times of the nearest one, a new run with those of
    the run before, and the first round says how much all of them are longer or shorter.
    """

    def __init__(self, choices: list[int], memory: float, explore_every: int, before: "_ByCost | None" = None) -> None:
        super().__init__(choices[-1])
        self.choices, self.memory, self.explore_every = choices, memory, explore_every
        self.seconds: dict[int, dict[int, float]] = {}
        self.tried: dict[tuple[int, int], int] = {}
        self.acceptance = [0.7] * self.most
        self.rounds = 0
        if before is not None:
            self.seconds = {rows: dict(times) for rows, times in before.seconds.items()}
            self.acceptance, self.rounds = list(before.acceptance), before.rounds

    def depth(self, rows: int) -> int:
        self.rounds += 1
        untried = [choice for choice in self.choices if choice not in self._seconds(rows)]
        if untried:
            return untried[-1]
        best = max(self.choices, key=lambda choice: self._speed(rows, choice))
        if self.rounds % self.explore_every == 0:
            place = self.choices.index(best)
            others = [*self.choices[max(place - 1, 0) : place], *self.choices[place + 1 : place + 2]]
            return others[self.rounds // self.explore_every % len(others)]
        return best

    def _seconds(self, rows: int) -> dict[int, float]:
        if rows not in self.seconds:
            nearest = min(self.seconds, key=lambda known: abs(known - rows), default=None)
            self.seconds[rows] = {} if nearest is None else dict(self.seconds[nearest])
        return self.seconds[rows]

    def _speed(self, rows: int, choice: int) -> float:
        expected, chance = 1.0, 1.0
        for share in self.acceptance[:choice]:
            chance *= share
            expected += chance
        return expected / self.seconds[rows][choice]

    def learn(self, rows: int, drafted: int, accepted: npt.ArrayLike, limits: npt.ArrayLike, seconds: float) -> None:
        if drafted in self.choices:
            self._learn_time(rows, drafted, seconds)
        accepted, depths = np.asarray(accepted)[:, None], np.arange(drafted)
        tried = (accepted >= depths) & (np.asarray(limits)[:, None] > depths)
        tries, hits = tried.sum(axis=0).tolist(), (accepted > depths).sum(axis=0).tolist()
        for depth, count in enumerate(tries[: self.most]):  # more can be drafted from the text
            if count:
                weight = self.memory**count
                self.acceptance[depth] = weight * self.acceptance[depth] + (1 - weight) * hits[depth] / count

    def _learn_time(self, rows: int, drafted: int, seconds: float) -> None:
        times = self._seconds(rows)
        known = times.get(drafted, seconds)
        if not any((rows, choice) in self.tried for choice in self.choices):
            times.update({choice: time * seconds / known for choice, time in times.items()})
            known = seconds
        past = self.memory ** max(1.0, self.rounds - self.tried.get((rows, drafted), -math.inf))
        if seconds < known / 4:  # what took so much longer was something else: compilation, say
            past = 0.0
        times[drafted] = past * known + (1 - past) * min(seconds, 4 * known)
        self.tried[rows, drafted] = self.rounds


def now() -> float:
    """Return the time in seconds. A round ends with its tokens on the CPU, so with all of its work on a GPU done."""
    return time.perf_counter()
