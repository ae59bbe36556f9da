"""The acceptance rules: how drafts are sampled, and which of them are accepted."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.sampling.noise import RowNoise, sample
from mtp_modules.decoders.verification.functional import (
    Verdict,
    accept_among_top,
    accept_block,
    accept_by_rejection,
    accept_greedy,
    accept_typical,
    within,
)


class Candidates(NamedTuple):
    """Drafts and all that a rule may look at to verify them; ``C = K + 1``.

    Attributes:
        drafts: ``(B, K)``, proposed tokens.
        draft_probs: ``(B, K, V)``, the very distributions that they were sampled from; one-hot where they were not.
        target_probs: ``(B, C, V)``, the model's own distributions.
        scores: ``(B, C, V)``, the logits that these were made from, penalties and allowed tokens included.
        limits: ``(B,)``, how many of each row's drafts count.
    """

    drafts: Int[Tensor, "B K"]
    draft_probs: Float[Tensor, "B K V"]
    target_probs: Float[Tensor, "B C V"]
    scores: Float[Tensor, "B C V"]
    limits: Int[Tensor, " B"]


class Acceptance(Component, ABC):
    """Samples drafts, and decides which of them are accepted.

    Attributes:
        lossless: Whether the output follows the distribution of plain decoding.
        compilable: Whether it is tensor operations alone, so that a compiled round can hold it.
    """

    lossless: bool = True
    compilable: bool = False

    def prepare(self, noise: RowNoise) -> None:
        """Ask for the random numbers that a round needs, so that a compiled round need not make them."""
        noise.uniforms()

    @abstractmethod
    def sample_draft(self, probs: Float[Tensor, "B V"], depth: int, noise: RowNoise) -> Int[Tensor, " B"]:
        """Sample a draft of every row.

        Args:
            probs: The head's distribution.
            depth: Place among the drafts, from 0.
            noise: Of the round.
        """

    @abstractmethod
    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        """Decide which drafts are accepted, and which token follows them.

        Args:
            candidates: Drafts, and the distributions on both sides.
            noise: Of the round.
        """


class ExactMatch(Acceptance):
    """Sample the model's own tokens as plain decoding would, and accept the drafts that are equal.

    Every position of a text has its random numbers, and both the draft and the model sample with them (the Gumbel-max
    trick), so they mostly agree where their distributions do. The output is **the very sample that plain decoding would
    have given** for the same seed, whatever the drafts, their number, the draft policy or the neighbours in the batch.
    It accepts a draft with probability at least ``(1 - TV) / (1 + TV)``, a little less than :class:`RejectionSampling`,
    which reaches ``1 - TV``. Daliri et al. 2024 (arXiv 2408.07978).
    """

    compilable = True

    def prepare(self, noise: RowNoise) -> None:
        """Ask for the numbers of the next positions."""
        noise.gumbels()

    def sample_draft(self, probs: Float[Tensor, "B V"], depth: int, noise: RowNoise) -> Int[Tensor, " B"]:
        """Sample a draft with the numbers of its position."""
        return noise.sample(probs[:, None], depth)[:, 0]

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        """Compare drafts with the model's own samples."""
        drafts, own = candidates.drafts, noise.sample(candidates.target_probs)
        accepted = accept_greedy(torch.where(within(candidates.limits, drafts.shape[1]), drafts, -1), own)
        return Verdict(accepted, own.gather(1, accepted[:, None])[:, 0])


class _SampledDrafts(Acceptance):
    """Rules whose drafts have random numbers of their own."""

    compilable = True

    def sample_draft(self, probs: Float[Tensor, "B V"], depth: int, noise: RowNoise) -> Int[Tensor, " B"]:
        """Sample a draft from exactly these probabilities."""
        return sample(probs, noise.for_draft(depth))


class RejectionSampling(_SampledDrafts):
    """Accept a draft with probability ``min(1, p / q)``: lossless speculative sampling.

    The output follows the distribution of plain decoding, but is another sample: it depends on the drafts and on their
    number. Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).
    """

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        """Accept or reject one draft after the other."""
        drafts, draft_probs, target_probs, _, limits = candidates
        return accept_by_rejection(
            drafts, draft_probs, target_probs, limits, noise.for_verification(target_probs.shape[1])
        )


class BlockVerification(_SampledDrafts):
    """Verify all drafts of a round together: lossless, and never shorter on average than :class:`RejectionSampling`.

    Sun et al. 2024 (arXiv 2403.10444).
    """

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        """Accept the longest run of drafts that may be accepted."""
        drafts, draft_probs, target_probs, _, limits = candidates
        return accept_block(drafts, draft_probs, target_probs, limits, noise.for_verification(target_probs.shape[1]))


class TypicalAcceptance(_SampledDrafts):
    r"""Accept drafts that the model finds likely enough. **Lossy**: the output follows another distribution.

    A draft is accepted if :math:`p(x) > \min(\epsilon, \delta e^{-H(p)})`. Cai et al. 2024 (arXiv 2401.10774).

    Args:
        epsilon: Probability that is always enough.
        delta: Share of the typical probability that is enough; the square root of ``epsilon`` if ``None``.

    Raises:
        ValueError: If a number is not in (0, 1].
    """

    lossless = False

    def __init__(self, *, epsilon: float = 0.09, delta: float | None = None) -> None:
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if value is not None and not 0 < value <= 1:
                refuse(self, f"{name} must lie in (0, 1], got {value}.")
        self.epsilon, self.delta = epsilon, epsilon**0.5 if delta is None else delta

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        """Accept the first drafts that are likely enough."""
        drafts, _, target_probs, _, limits = candidates
        uniform = noise.for_verification(1)[:, 0]
        return accept_typical(drafts, target_probs, limits, uniform, epsilon=self.epsilon, delta=self.delta)


class TopKAcceptance(_SampledDrafts):
    """Accept drafts that are among the model's most likely tokens. **Lossy**: the output follows another distribution.

    Stern et al. 2018 (arXiv 1811.03115).

    Args:
        top_k: How many tokens are good enough.

    Raises:
        ValueError: If ``top_k`` is below 1.
    """

    lossless = False

    def __init__(self, *, top_k: int) -> None:
        self.top_k = whole(self, "top_k", top_k, 1)

    def verify(self, candidates: Candidates, noise: RowNoise) -> Verdict:
        """Accept the first drafts that are good enough."""
        drafts, _, target_probs, scores, limits = candidates
        uniform = noise.for_verification(1)[:, 0]
        return accept_among_top(drafts, scores, target_probs, limits, uniform, top_k=self.top_k)
