"""How the tokens of a round are drawn: the model's own, and which drafts hold."""

import torch

from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.sampling.parameters import BatchSampling, History
from mtp_modules.decoders.verification.rules import Acceptance, RowNoise


class Drawing:
    """What the tokens of one round are drawn with.

    Args:
        laws: Of the rows.
        acceptance: How drafts are drawn, and which of them hold.
        noise: The round's random numbers.
        history: Counts for penalties; ``None`` where no law has any.
    """

    def __init__(self, laws: BatchSampling, acceptance: Acceptance, noise: RowNoise, history: History | None) -> None:
        self.laws, self.acceptance, self.noise, self.history = laws, acceptance, noise, history

    def scores(self, logits: Float[Tensor, "B C V"], emitted: Int[Tensor, "B _ V"] | None) -> Float[Tensor, "B C V"]:
        """Return logits with what the rows' laws do before they sharpen and truncate.

        Args:
            logits: The model's, or a head's.
            emitted: How often each token is in the output before each place; what the history has if ``None``.
        """
        if self.history is None:
            return self.laws.scores(logits)
        emitted = self.history.emitted[:, None] if emitted is None else emitted
        return self.laws.scores(logits, emitted, self.history.prompted)

    def law(
        self, logits: Float[Tensor, "B C V"], emitted: Int[Tensor, "B _ V"] | None = None
    ) -> Float[Tensor, "B C V"]:
        """Return the laws that tokens are drawn from, float64.

        Args:
            logits: The model's, or a head's.
            emitted: See :meth:`scores`.
        """
        return self.laws(self.scores(logits, emitted))

    def verify(
        self,
        drafts: Int[Tensor, "B K"],
        source: Float[Tensor, "B K V"] | None,
        limits: Int[Tensor, " B"],
        logits: Float[Tensor, "B C V"],
    ) -> tuple[Int[Tensor, "B C"], Int[Tensor, " B"], Float[Tensor, "B C V"]]:
        """Return the new tokens of a round, how many of each row's are drafts, one more counting, and the model's laws.

        Args:
            drafts: Proposed tokens.
            source: The laws that they were drawn from; ``None`` if there are no drafts.
            limits: How many of each row's count.
            logits: Of the token before the first draft, of the first draft, and so on; ``C = K + 1``.
        """
        scores = self.scores(logits, None if self.history is None else self.history.after(drafts))
        target = self.laws(scores)
        source = target[:, :0] if source is None else source
        accepted, following = self.acceptance.verify(drafts, source, target, scores, limits, self.noise)
        tokens = torch.cat((drafts, following[:, None]), dim=1)
        return tokens.scatter(1, accepted[:, None], following[:, None]), accepted, target
