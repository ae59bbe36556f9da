"""Walk along a text and let the heads draft after its tokens: how drafts fare where the text is not the model's own."""

from dataclasses import dataclass

import torch

from mtp_modules.core.checks import at_least, refuse, tokens_in_vocabulary
from mtp_modules.core.drafts import Draft, DraftSampler
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.decoders.verification.functional import accept_greedy


@dataclass(frozen=True)
class DraftedText:
    """N rounds of speculative decoding, each as if the text up to some token had just been emitted.

    Attributes:
        rows: ``(N,)``, the row of the text.
        places: ``(N,)``, the place in it of the token that the drafts follow.
        drafts: ``(N, K)``, the likeliest drafts, nearest first.
        own: ``(N, K)``, what the model itself would have chosen in their place, given the drafts before.
        confidence: ``(N, K)``, the probability of each draft by its own law at temperature 1, float64.
        accepted: ``(N,)``, how many of the drafts greedy decoding accepts.
        before: ``(N, K)``, the chance that all drafts before each depth hold if they are drawn at temperature 1 and
            verified by rejection sampling: an unbiased estimate from one drawn chain, float64.
        overlap: ``(N, K)``, the chance that the draft at each depth then holds too, 1 - TV(p, q) between the model's
            law and the draft's after that chain, float64.
    """

    rows: Int[Tensor, " N"]
    places: Int[Tensor, " N"]
    drafts: Int[Tensor, "N K"]
    own: Int[Tensor, "N K"]
    confidence: Float[Tensor, "N K"]
    accepted: Int[Tensor, " N"]
    before: Float[Tensor, "N K"]
    overlap: Float[Tensor, "N K"]

    @property
    def reach(self) -> Float[Tensor, "N K"]:
        """The chance that all drafts up to each depth hold, drawn at temperature 1."""
        return self.before * self.overlap


class _AtTemperatureOne:
    """Sample drafts at temperature 1."""

    done = False

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, logits: Float[Tensor, "B V"]) -> tuple[Int[Tensor, " B"], Float[Tensor, "B V"]]:
        probs = logits.double().softmax(dim=-1)
        return probs.multinomial(1, generator=self.generator)[:, 0], probs


class _Walk:
    """A model and the states of its trunk and heads, all rows at the same place."""

    def __init__(self, model: DecodableModel, rows: int, capacity: int, num_drafts: int) -> None:
        self.model, self.rows, self.num_drafts = model, rows, num_drafts
        self.trunk_state: DecodingState = model.trunk.new_state(rows, capacity)
        self.heads_state: DecodingState = model.heads.new_state(rows, capacity)

    def read(self, chunk: Int[Tensor, "B C"], keep: int) -> Float[Tensor, "B C D"]:
        output, embed = self.model.trunk(chunk, state=self.trunk_state), self.model.trunk.embedding
        given = self.model.heads.features_of(output)
        states = self.model.heads.extend(output.hidden, self.heads_state, tokens=chunk, embed=embed, **given)
        for state in (self.trunk_state, self.heads_state):
            state.commit([keep] * self.rows)
        return states

    def round(self, token: Int[Tensor, " B"], sampler: DraftSampler | None) -> tuple[Draft, Float[Tensor, "B C V"]]:
        """Draft after a token, and return what the model says at the place of each draft; nothing stays read."""
        model = self.model
        draft = model.heads.draft(
            token,
            self.heads_state,
            num_drafts=self.num_drafts,
            embed=model.trunk.embedding,
            unembed=model.unembedding.logits,
            sampler=sampler,
        )
        states = self.read(torch.cat((token[:, None], draft.tokens), dim=1), keep=0)
        return draft, model.unembedding.logits(states[:, :-1])


@torch.inference_mode()
def draft_along(
    model: DecodableModel,
    tokens: Int[Tensor, "B L"],
    *,
    num_drafts: int,
    document_ids: Int[Tensor, "B L"] | None = None,
    every: int = 1,
    seed: int = 0,
) -> DraftedText:
    """Draft after the tokens of a text, and verify with the model.

    The trunk reads the text once, as decoding does; each round is that of
    :class:`~mtp_modules.decoders.SpeculativeDecoder` had it just emitted the token.

    Args:
        model: Trunk, heads and unembedding.
        tokens: The text; all rows are of one length.
        num_drafts: Drafts ``K`` of a round.
        document_ids: Which document every token belongs to; a row counts up to its first boundary.
        every: Draft after every so many tokens.
        seed: Of the drawn drafts.

    Raises:
        ValueError: If a number is out of range, or the text has no room for a round.
    """
    at_least("draft_along", "every", every, 1)
    model.heads.check_num_drafts(num_drafts)
    tokens_in_vocabulary("draft_along", tokens, model.trunk.vocab_size)
    rows, length = tokens.shape
    limit = model.trunk.max_positions
    last = length - 1 if limit is None else min(length - 1, limit - num_drafts - 1)
    if last < 1:
        refuse(
            "draft_along",
            f"a text of {length} tokens leaves no room for {num_drafts} drafts within max_positions={limit}; "
            "give a longer text, or draft less.",
        )
    device = model.unembedding.weight.device
    tokens = tokens.to(device)
    document_ids = torch.zeros_like(tokens) if document_ids is None else document_ids.to(device)
    sampler = _AtTemperatureOne(torch.Generator(device=device).manual_seed(seed))
    walk = _Walk(model, rows, last + num_drafts + 1, num_drafts)
    walk.read(tokens[:, :1], keep=1)
    found: list[tuple[Tensor, ...]] = []
    for place in range(1, last + 1, every):
        token = tokens[:, place]
        draft, logits = walk.round(token, None)
        own = logits.argmax(dim=-1)
        assert draft.logits is not None
        confidence = _of(draft.logits.double().softmax(dim=-1), draft.tokens)
        accepted = accept_greedy(draft.tokens, own)
        before, overlap = chances(*walk.round(token, sampler))
        counts = document_ids[:, place] == document_ids[:, 0]
        at = (torch.arange(rows, device=device), torch.full_like(token, place))
        found.append(tuple(x[counts].cpu() for x in (*at, draft.tokens, own, confidence, accepted, before, overlap)))
        step = min(every, last - place)
        if step:
            walk.read(tokens[:, place : place + step], keep=step)
    return DraftedText(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def chances(draft: Draft, logits: Float[Tensor, "B K V"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    r"""Return the chance that drafts before each depth hold, given a drawn chain, and that the one there does.

    By rejection sampling, drafts up to depth :math:`d - 1` hold with probability :math:`\prod \min(1, p/q)`, and then a
    draft from :math:`q` with :math:`\sum_x \min(p(x), q(x)) = 1 - TV(p, q)` (Leviathan et al. 2023, arXiv 2211.17192,
    section 3.2).

    Args:
        draft: Drawn at temperature 1.
        logits: What the model says in their place.
    """
    assert draft.probs is not None
    source, target = draft.probs, logits.double().softmax(dim=-1)
    holds = torch.minimum(source, target).sum(dim=-1)
    ratio = (_of(target, draft.tokens) / _of(source, draft.tokens)).clamp(max=1)
    before = torch.cat((torch.ones_like(ratio[:, :1]), ratio[:, :-1]), dim=1).cumprod(dim=1)
    return before, holds


def _of(law: Float[Tensor, "B K V"], tokens: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    return law.gather(2, tokens[:, :, None])[:, :, 0]
