"""How the tokens of one round are sampled: the drafts, the model's own, and the choice between them."""

import torch

from mtp_modules.core.drafts import Draft, ancestors_of
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.sampling.batch import BatchSampling, History
from mtp_modules.decoders.sampling.noise import RowNoise
from mtp_modules.decoders.verification.rules import Acceptance, Candidates
from mtp_modules.decoders.verification.trees import counts_along


class RoundSampler:
    """What the tokens of one round are sampled with.

    Args:
        params: Sampling parameters of the rows.
        acceptance: How drafts are sampled, and which are accepted.
        noise: The round's random numbers.
        history: Counts for penalties; ``None`` where no row has any.
    """

    def __init__(self, params: BatchSampling, acceptance: Acceptance, noise: RowNoise, history: History | None) -> None:
        self.params, self.acceptance, self.noise, self.history = params, acceptance, noise, history

    def scores(self, logits: Float[Tensor, "B C V"], emitted: Int[Tensor, "B _ V"] | None) -> Float[Tensor, "B C V"]:
        """Return logits with penalties, and minus infinity where a token is not allowed.

        Args:
            logits: The model's, or a head's.
            emitted: How often each token is in the output before each position; what the history has if ``None``.
        """
        if self.history is None:
            return self.params.scores(logits)
        emitted = self.history.emitted[:, None] if emitted is None else emitted
        return self.params.scores(logits, emitted, self.history.prompted)

    def probs(
        self, logits: Float[Tensor, "B C V"], emitted: Int[Tensor, "B _ V"] | None = None
    ) -> Float[Tensor, "B C V"]:
        """Return the distributions that tokens are sampled from, float64."""
        return self.params.probs(self.scores(logits, emitted))

    def verify(
        self, draft: Draft, limits: Int[Tensor, " B"], logits: Float[Tensor, "B C V"]
    ) -> tuple[Int[Tensor, "B C"], Int[Tensor, " B"], Float[Tensor, "B C V"], Float[Tensor, "B C V"]]:
        """Verify a chain of drafts.

        Args:
            draft: Proposed tokens.
            limits: How many of each row's count.
            logits: Of the token before the first draft, of the first draft, and so on; ``C = K + 1``.

        Returns:
            The new tokens of each row; how many of them are accepted drafts, one more counting; the model's own scores
            and distributions.
        """
        scores = self.scores(logits, None if self.history is None else self.history.after(draft.tokens))
        target_probs = self.params.probs(scores)
        draft_probs = target_probs[:, :0] if draft.probs is None else draft.probs
        candidates = Candidates(draft.tokens, draft_probs, target_probs, scores, limits)
        accepted, following = self.acceptance.verify(candidates, self.noise)
        tokens = torch.cat((draft.tokens, following[:, None]), dim=1)
        return tokens.scatter(1, accepted[:, None], following[:, None]), accepted, scores, target_probs

    def own_choices(
        self, chunk: Int[Tensor, "B C"], parents: Int[Tensor, "B C"], logits: Float[Tensor, "B C V"]
    ) -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C V"]]:
        """Sample the token that the model itself would emit after each token of a tree, and return its scores too.

        Args:
            chunk: The token emitted last, the root, and drafts.
            parents: Place in the chunk of the token before each; -1 for the root.
            logits: After each token of the chunk.
        """
        ancestors = ancestors_of(parents)
        emitted = None if self.history is None else counts_along(chunk, ancestors, self.history.emitted)
        scores = self.scores(logits, emitted)
        depths = (ancestors.sum(dim=2) - 1)[:, :, None].expand_as(scores)
        return (self.params.probs(scores).log() + self.noise.gumbels().gather(1, depths)).argmax(dim=-1), scores
