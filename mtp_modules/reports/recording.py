"""What happened in a run of a decoder, token by token: by what laws each was drafted, verified and chosen."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.decoders import DecodingStats, Round, RoundDistributions


@dataclass(frozen=True)
class Alternative:
    """A token that a law holds for likely.

    Attributes:
        token: Its id.
        probability: By that law.
    """

    token: int
    probability: float


@dataclass(frozen=True)
class RejectedDraft:
    """A draft that was read and thrown away.

    Attributes:
        token: Its id.
        depth: How far ahead it was drafted, from 1.
        p: Its probability by the model's law, after the drafts before it.
        q: Its probability by the law that it was drafted from.
    """

    token: int
    depth: int
    p: float
    q: float


@dataclass(frozen=True)
class RecordedToken:
    """A token of the output.

    Attributes:
        token: Its id.
        depth: The depth at which it was drafted, from 1; 0 for the model's own.
        p: Its probability by the model's law.
        q: By the draft's law for this place; ``None`` if nothing was drafted here.
        model: The likeliest tokens of the model's law.
        draft: The likeliest tokens of the draft's law; empty if nothing was drafted here.
        rejected: Drafts that this token replaced: the one in its place, and those behind.
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
    """A run with one prompt.

    Attributes:
        prompt: Its token ids.
        tokens: The output.
        stats: Counts of the run.
    """

    prompt: list[int]
    tokens: list[RecordedToken]
    stats: DecodingStats


def record(prompt: list[int], rounds: Iterable[Round], *, alternatives: int = 5) -> Recording:
    """Follow a decoder to its end.

    Args:
        prompt: What the decoder goes on from, alone.
        rounds: Its stream, made with ``return_distributions=True``.
        alternatives: How many tokens of each law to keep.

    Raises:
        ValueError: If the rounds keep no laws.
    """
    tokens: list[RecordedToken] = []
    stats = DecodingStats()
    for done in rounds:
        if done.distributions is None:
            refuse("record", "the rounds tell no laws; make the decoder with return_distributions=True.")
        stats.count(done)
        tokens += _round(done, done.distributions, alternatives)
    return Recording(prompt, tokens, stats)


def _round(done: Round, laws: RoundDistributions, alternatives: int) -> list[RecordedToken]:
    new, drafted, drafts = done.tokens[0], done.drafted[0], laws.drafts[0].tolist()
    chances, draft_chances = laws.target_probs[0].cpu(), laws.draft_probs[0].cpu()
    found = []
    for place, token in enumerate(new):
        own = place >= done.accepted[0]
        rejected = []
        if own:
            rejected = [
                RejectedDraft(
                    token=drafts[behind],
                    depth=behind + 1,
                    p=chances[behind, drafts[behind]].item(),
                    q=draft_chances[behind, drafts[behind]].item(),
                )
                for behind in range(place, drafted)
            ]
        source = draft_chances[place] if place < drafted else None
        found.append(
            RecordedToken(
                token=token,
                depth=0 if own else place + 1,
                p=chances[place, token].item(),
                q=None if source is None else source[token].item(),
                model=_likeliest(chances[place], alternatives),
                draft=[] if source is None else _likeliest(source, alternatives),
                rejected=rejected,
            )
        )
    return found


def _likeliest(law: Float[Tensor, " V"], count: int) -> list[Alternative]:
    """Return the likeliest tokens, without those that cannot come at all."""
    values, tokens = torch.topk(law, min(count, len(law)))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [Alternative(token, probability) for token, probability in pairs if probability > 0]
