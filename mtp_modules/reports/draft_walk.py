"""Draft along a given text: rounds of speculative decoding on text that the model did not generate."""

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
        positions: ``(N,)``, the position in the row of the token that the drafts follow.
        drafts: ``(N, K)``, the greedy drafts, first one first.
        target_tokens: ``(N, K)``, the model's argmax token at the position of each draft, given the earlier drafts.
        confidence: ``(N, K)``, the probability of each draft under the draft distribution at temperature 1, float64.
        accepted: ``(N,)``, how many of the drafts greedy decoding accepts.
        before: ``(N, K)``, the probability that rejection sampling accepts all drafts before each depth at temperature
            1: an unbiased estimate from one sampled chain, float64.
        overlap: ``(N, K)``, the probability that the draft at each depth is then accepted too: 1 - TV(p, q) between the
            distributions of model and draft after that chain, float64.
        predicted: ``(N, K)``, the probability of acceptance that the heads predict of each greedy draft, float64;
            ``(N, 0)`` if they predict none.
    """

    rows: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    drafts: Int[Tensor, "N K"]
    target_tokens: Int[Tensor, "N K"]
    confidence: Float[Tensor, "N K"]
    accepted: Int[Tensor, " N"]
    before: Float[Tensor, "N K"]
    overlap: Float[Tensor, "N K"]
    predicted: Float[Tensor, "N _"]

    @property
    def reach(self) -> Float[Tensor, "N K"]:
        """The probability that all drafts up to each depth are accepted at temperature 1."""
        return self.before * self.overlap


class _AtTemperatureOne:
    """Sample drafts at temperature 1."""

    done = False

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(
        self, logits: Float[Tensor, "B V"], confidence: Float[Tensor, " B"] | None = None
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, "B V"]]:
        probs = logits.double().softmax(dim=-1)
        return probs.multinomial(1, generator=self.generator)[:, 0], probs


class _Walk:
    """A model and the decoding states of its trunk and heads, all rows at the same position."""

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
        """Draft after a token, and return the model's logits at each draft's position; the states do not change."""
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

    The trunk reads the text once, as in decoding. Each round equals that of
    :class:`~mtp_modules.decoders.SpeculativeDecoder` after it has emitted the token.

    Args:
        model: Trunk, heads and unembedding.
        tokens: The text; all rows have one length.
        num_drafts: Number ``K`` of drafts per round.
        document_ids: The document of every token; a row is used up to its first boundary.
        every: Draft after every ``every``-th token.
        seed: Seed of the sampled drafts.

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
            "give a longer text, or use fewer drafts.",
        )
    device = model.unembedding.weight.device
    tokens = tokens.to(device)
    document_ids = torch.zeros_like(tokens) if document_ids is None else document_ids.to(device)
    sampler = _AtTemperatureOne(torch.Generator(device=device).manual_seed(seed))
    walk = _Walk(model, rows, last + num_drafts + 1, num_drafts)
    walk.read(tokens[:, :1], keep=1)
    found: list[tuple[Tensor, ...]] = []
    for position in range(1, last + 1, every):
        token = tokens[:, position]
        draft, logits = walk.round(token, None)
        target = logits.argmax(dim=-1)
        assert draft.logits is not None
        confidence = _of(draft.logits.double().softmax(dim=-1), draft.tokens)
        accepted = accept_greedy(draft.tokens, target)
        before, overlap = acceptance_chances(*walk.round(token, sampler))
        predicted = confidence[:, :0] if draft.confidence is None else draft.confidence
        counts = document_ids[:, position] == document_ids[:, 0]
        at = (torch.arange(rows, device=device), torch.full_like(token, position))
        parts = (*at, draft.tokens, target, confidence, accepted, before, overlap, predicted)
        found.append(tuple(part[counts].cpu() for part in parts))
        step = min(every, last - position)
        if step:
            walk.read(tokens[:, position : position + step], keep=step)
    return DraftedText(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def acceptance_chances(
    draft: Draft, logits: Float[Tensor, "B K V"]
) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    r"""Return the probability that the drafts before each depth of a sampled chain are accepted, and that the next is.

    Rejection sampling accepts the drafts up to depth :math:`d - 1` with probability :math:`\prod \min(1, p/q)`, and
    then a draft from :math:`q` with :math:`\sum_x \min(p(x), q(x)) = 1 - TV(p, q)` (Leviathan et al. 2023, arXiv
    2211.17192, section 3.2).

    Args:
        draft: Drafts sampled at temperature 1.
        logits: The model's logits at their positions.
    """
    assert draft.probs is not None
    source, target = draft.probs, logits.double().softmax(dim=-1)
    overlap = torch.minimum(source, target).sum(dim=-1)
    ratio = (_of(target, draft.tokens) / _of(source, draft.tokens)).clamp(max=1)
    before = torch.cat((torch.ones_like(ratio[:, :1]), ratio[:, :-1]), dim=1).cumprod(dim=1)
    return before, overlap


def _of(probs: Float[Tensor, "B K V"], tokens: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    return probs.gather(2, tokens[:, :, None])[:, :, 0]
