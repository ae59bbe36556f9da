"""How drafts are drawn and which of them a verification accepts, as components."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.sampling.noise import draw, gumbels, uniforms
from mtp_modules.decoders.verification.functional import (
    Verdict,
    accept_among_top,
    accept_block,
    accept_by_rejection,
    accept_greedy,
    accept_typical,
    within,
)

_OWN, _APART = 0, 1


class RowNoise:
    """The random numbers of one round: functions of each row's seed and of how far its text has come.

    They are made once, when they are first asked for.

    Args:
        seeds: ``(B,)``.
        places: ``(B,)``, how many tokens each row has, prompt included: the place of the next one.
        vocab_size: Number ``V`` of token ids.
        most: Most tokens ``C`` that the round can bring a row.
        gumbels: What makes Gumbel numbers; a compiled :func:`~mtp_modules.decoders.sampling.noise.gumbels`, for instance.
    """

    def __init__(
        self,
        seeds: Int[Tensor, " B"],
        places: Int[Tensor, " B"],
        vocab_size: int,
        most: int,
        gumbels: Callable[..., Tensor] = gumbels,
    ) -> None:
        self.seeds, self.places, self.vocab_size, self.most = seeds, places, vocab_size, most
        self._gumbels = gumbels
        self._own: Float[Tensor, "B C V"] | None = None
        self._apart: Float[Tensor, "B _"] | None = None

    @staticmethod
    def _made_before(numbers: Tensor | None) -> None:
        """Refuse to make numbers in a graph of a round, which is compiled for other things."""
        if numbers is None and torch.compiler.is_compiling():
            refuse("RowNoise", "numbers are asked for in a compiled round; let Acceptance.prepare ask for them before.")

    def own(self) -> Float[Tensor, "B C V"]:
        """Return the Gumbel numbers that the tokens at the next places are chosen with, by whomever."""
        self._made_before(self._own)
        if self._own is None:
            places = self.places[:, None] + torch.arange(self.most, device=self.places.device)
            self._own = self._gumbels(self.seeds, places, stream=_OWN, width=self.vocab_size)
        return self._own

    def apart(self) -> Float[Tensor, "B _"]:
        """Return the numbers of this round alone: by turns one for a draft, and one for the verification."""
        self._made_before(self._apart)
        if self._apart is None:
            self._apart = uniforms(self.seeds, self.places[:, None], stream=_APART, width=2 * self.most)[:, 0]
        return self._apart

    def for_draft(self, depth: int) -> Float[Tensor, " B"]:
        """Return the number that a draft of this round is drawn with.

        Args:
            depth: Its place among the drafts, from 0.
        """
        return self.apart()[:, 2 * depth]

    def for_verdict(self, width: int) -> Float[Tensor, "B W"]:
        """Return the numbers that a verification of this round needs.

        Args:
            width: How many, at most ``C``.
        """
        return self.apart()[:, 1 : 2 * width : 2]


class Acceptance(Component, ABC):
    """Draws drafts from laws, and says which of them hold.

    Attributes:
        lossless: Whether the tokens that come out follow the law of plain decoding.
        in_one_graph: Whether it is tensor operations alone, so that a compiled round can hold it.
    """

    lossless: bool = True
    in_one_graph: bool = False

    def prepare(self, noise: RowNoise) -> None:
        """Ask for the random numbers that a round needs, so that a compiled round need not make them.

        Args:
            noise: Of the round.
        """
        noise.apart()

    @abstractmethod
    def choose(self, law: Float[Tensor, "B V"], depth: int, noise: RowNoise) -> Int[Tensor, " B"]:
        """Draw a draft.

        Args:
            law: What the head proposes.
            depth: Place among the drafts, from 0.
            noise: Of the round.
        """

    @abstractmethod
    def verify(
        self,
        drafts: Int[Tensor, "B K"],
        source: Float[Tensor, "B K V"],
        target: Float[Tensor, "B C V"],
        scores: Float[Tensor, "B C V"],
        limits: Int[Tensor, " B"],
        noise: RowNoise,
    ) -> Verdict:
        """Say which drafts hold, and which token follows them.

        Args:
            drafts: Proposed tokens.
            source: The very laws that they were drawn from; a point mass where they were not drawn.
            target: The model's own laws, ``C = K + 1``.
            scores: The logits that these were made from, penalties and allowed tokens included.
            limits: How many of each row's drafts count.
            noise: Of the round.
        """


def own_choice(law: Float[Tensor, "B C V"], noise: RowNoise, depth: int = 0) -> Int[Tensor, "B C"]:
    """Draw from laws with the numbers that belong to the places of the text: what plain decoding does.

    Args:
        law: One a place.
        noise: Of the round.
        depth: Place of the first law after the next token's.
    """
    return (law.log() + noise.own()[:, depth : depth + law.shape[1]]).argmax(dim=-1)


class ExactMatch(Acceptance):
    """Draw the model's own tokens as plain decoding would, and accept the drafts that are equal.

    Every place of a text has its random numbers, and both the draft and the model choose with them (Gumbel's trick), so
    they mostly agree where their laws do. The output is **the very sample that plain decoding would have given** for
    the same seed, whatever the drafts, their number, the draft policy or the neighbours in the batch. It accepts a
    draft with probability at least ``(1 - TV) / (1 + TV)``, a little less than :class:`RejectionSampling`, which
    reaches ``1 - TV``. Daliri et al. 2024 (arXiv 2408.07978).
    """

    in_one_graph = True

    def prepare(self, noise: RowNoise) -> None:
        """Ask for the numbers of the next places."""
        noise.own()

    def choose(self, law: Float[Tensor, "B V"], depth: int, noise: RowNoise) -> Int[Tensor, " B"]:
        """Draw a draft with the numbers of its place."""
        return own_choice(law[:, None], noise, depth)[:, 0]

    def verify(
        self,
        drafts: Int[Tensor, "B K"],
        source: Float[Tensor, "B K V"],
        target: Float[Tensor, "B C V"],
        scores: Float[Tensor, "B C V"],
        limits: Int[Tensor, " B"],
        noise: RowNoise,
    ) -> Verdict:
        """Compare drafts with the model's own draws."""
        own = own_choice(target, noise)
        counted = torch.where(within(limits, drafts.shape[1]), drafts, -1)
        accepted = accept_greedy(counted, own)
        return Verdict(accepted, own.gather(1, accepted[:, None])[:, 0])


class _DrawnDrafts(Acceptance):
    """What acceptance rules with a draft's own random numbers share."""

    in_one_graph = True

    def choose(self, law: Float[Tensor, "B V"], depth: int, noise: RowNoise) -> Int[Tensor, " B"]:
        """Draw a draft from exactly this law."""
        return draw(law, noise.for_draft(depth))


class RejectionSampling(_DrawnDrafts):
    """Accept a draft with probability ``min(1, p / q)``: lossless speculative sampling.

    The output follows the law of plain decoding, but is another sample: it depends on the drafts and on their number.
    Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).
    """

    def verify(
        self,
        drafts: Int[Tensor, "B K"],
        source: Float[Tensor, "B K V"],
        target: Float[Tensor, "B C V"],
        scores: Float[Tensor, "B C V"],
        limits: Int[Tensor, " B"],
        noise: RowNoise,
    ) -> Verdict:
        """Accept or reject one draft after the other."""
        return accept_by_rejection(drafts, source, target, limits, noise.for_verdict(target.shape[1]))


class BlockVerification(_DrawnDrafts):
    """Verify all drafts of a round together: lossless, and never shorter on average than :class:`RejectionSampling`.

    Sun et al. 2024 (arXiv 2403.10444).
    """

    def verify(
        self,
        drafts: Int[Tensor, "B K"],
        source: Float[Tensor, "B K V"],
        target: Float[Tensor, "B C V"],
        scores: Float[Tensor, "B C V"],
        limits: Int[Tensor, " B"],
        noise: RowNoise,
    ) -> Verdict:
        """Accept the longest run of drafts that may hold."""
        return accept_block(drafts, source, target, limits, noise.for_verdict(target.shape[1]))


class TypicalAcceptance(_DrawnDrafts):
    r"""Accept drafts that the model finds likely enough. **Lossy**: the output follows another law.

    A draft holds if :math:`p(x) > \min(\epsilon, \delta e^{-H(p)})`. Cai et al. 2024 (arXiv 2401.10774).

    Args:
        epsilon: Probability that is always enough.
        delta: Share of the typical probability that is enough; the square root of ``epsilon`` if ``None``.

    Raises:
        ValueError: If a number is not in (0, 1].
    """

    lossless = False

    def __init__(self, *, epsilon: float = 0.09, delta: float | None = None) -> None:
        delta = epsilon**0.5 if delta is None else delta
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if not 0 < value <= 1:
                refuse(self, f"{name} must lie in (0, 1], got {value}.")
        self.epsilon, self.delta = epsilon, delta

    def verify(
        self,
        drafts: Int[Tensor, "B K"],
        source: Float[Tensor, "B K V"],
        target: Float[Tensor, "B C V"],
        scores: Float[Tensor, "B C V"],
        limits: Int[Tensor, " B"],
        noise: RowNoise,
    ) -> Verdict:
        """Accept the first drafts that are likely enough."""
        uniform = noise.for_verdict(1)[:, 0]
        return accept_typical(drafts, target, limits, uniform, epsilon=self.epsilon, delta=self.delta)


class TopKAcceptance(_DrawnDrafts):
    """Accept drafts that are among the model's likeliest tokens. **Lossy**: the output follows another law.

    Stern et al. 2018 (arXiv 1811.03115).

    Args:
        top_k: How many tokens are good enough.

    Raises:
        ValueError: If ``top_k`` is below 1.
    """

    lossless = False

    def __init__(self, *, top_k: int) -> None:
        at_least(self, "top_k", top_k, 1)
        self.top_k = top_k

    def verify(
        self,
        drafts: Int[Tensor, "B K"],
        source: Float[Tensor, "B K V"],
        target: Float[Tensor, "B C V"],
        scores: Float[Tensor, "B C V"],
        limits: Int[Tensor, " B"],
        noise: RowNoise,
    ) -> Verdict:
        """Accept the first drafts that are good enough."""
        return accept_among_top(drafts, scores, target, limits, noise.for_verdict(1)[:, 0], top_k=self.top_k)
