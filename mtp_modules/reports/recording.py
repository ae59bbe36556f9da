"""Record a generation token by token, with the distributions of model and drafts."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.decoders import DecodingStats, Round, RoundDistributions


@dataclass(frozen=True)
class Alternative:
    """One of the most likely tokens of a distribution.

    Attributes:
        token: Token id.
        probability: Probability of the token.
    """

    token: int
    probability: float


@dataclass(frozen=True)
class RejectedDraft:
    """A draft that was verified and rejected.

    Attributes:
        token: Token id.
        depth: Depth of the draft, from 1.
        p: Probability under the model's distribution, given the earlier drafts.
        q: Probability under the draft distribution.
    """

    token: int
    depth: int
    p: float
    q: float


@dataclass(frozen=True)
class RecordedToken:
    """A token of the output.

    Attributes:
        token: Token id.
        depth: Depth of an accepted draft, from 1; 0 for a token that the model chose.
        p: Probability under the model's distribution.
        q: Probability under the draft distribution of this position; ``None`` if nothing was drafted here.
        model: The most likely tokens of the model's distribution.
        draft: The most likely tokens of the draft distribution; empty if nothing was drafted here.
        rejected: Drafts that this token replaced: the one at its position, and the later ones.
    """

    token: int
    depth: int
    p: float
    q: float | None
    model: list[Alternative]
    draft: list[Alternative]
    rejected: list[RejectedDraft]


@dataclass(frozen=True)
class Recording:
    """A generation from one prompt.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Tokens of the output.
        stats: Counts of the run.
    """

    prompt: list[int]
    tokens: list[RecordedToken]
    stats: DecodingStats


def record(prompt: list[int], rounds: Iterable[Round], *, alternatives: int = 5) -> Recording:
    """Record the rounds of a decoder.

    Args:
        prompt: Token ids of the only prompt.
        rounds: Stream of the decoder, made with ``return_distributions=True``.
        alternatives: Number of tokens of each distribution to keep.

    Raises:
        ValueError: If the rounds have no distributions.
    """
    tokens: list[RecordedToken] = []
    stats = DecodingStats()
    for done in rounds:
        if done.distributions is None:
            refuse("record", "the rounds have no distributions; create the decoder with return_distributions=True.")
        stats.count(done)
        tokens += _round(done, done.distributions, alternatives)
    return Recording(prompt, tokens, stats)


def _round(done: Round, distributions: RoundDistributions, alternatives: int) -> list[RecordedToken]:
    new, drafted, drafts = done.tokens[0], done.drafted[0], distributions.drafts[0].tolist()
    target_probs, draft_probs = distributions.target_probs[0].cpu(), distributions.draft_probs[0].cpu()
    found = []
    for place, token in enumerate(new):
        is_draft = place < done.accepted[0]
        rejected = []
        if not is_draft:
            rejected = [
                RejectedDraft(
                    token=drafts[later],
                    depth=later + 1,
                    p=target_probs[later, drafts[later]].item(),
                    q=draft_probs[later, drafts[later]].item(),
                )
                for later in range(place, drafted)
            ]
        source = draft_probs[place] if place < drafted else None
        found.append(
            RecordedToken(
                token=token,
                depth=place + 1 if is_draft else 0,
                p=target_probs[place, token].item(),
                q=None if source is None else source[token].item(),
                model=_most_likely(target_probs[place], alternatives),
                draft=[] if source is None else _most_likely(source, alternatives),
                rejected=rejected,
            )
        )
    return found


def _most_likely(probs: Float[Tensor, " V"], count: int) -> list[Alternative]:
    """Return the most likely tokens, without those of probability 0."""
    values, tokens = torch.topk(probs, min(count, len(probs)))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [Alternative(token, probability) for token, probability in pairs if probability > 0]
