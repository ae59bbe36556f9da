"""The body of every round: draft, read, verify. The loop commits what it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mtp_modules.core.drafts import Draft, one_hot
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.decoders.drafting.drafter import Drafter, DraftingContext
from mtp_modules.decoders.drafting.policies import DepthChooser
from mtp_modules.decoders.drafting.text import LookedUp
from mtp_modules.decoders.results import RoundDistributions, pack_result
from mtp_modules.decoders.verification.functional import greedy_round
from mtp_modules.decoders.verification.round_sampler import RoundSampler
from mtp_modules.decoders.verification.trees import walk

Reader = Callable[[Int[Tensor, "B C"], Draft], Float[Tensor, "B C V"]]
"""Appends a chunk, the token emitted last and drafts behind it, to the states; returns horizon 1's logits."""


@dataclass(frozen=True)
class RoundInputs:
    """What a round starts from.

    Attributes:
        token: ``(B,)``, the token that each row emitted last, which the trunk has not read.
        limits: ``(B,)``, how many drafts of each row may count.
        num_drafts: Most drafts one after the other.
        num_by_heads: How many of them the heads make, where they do.
        drafter: Where drafts come from; ``None`` for plain decoding.
        chooser: Ends rows by the confidence in their drafts; ``None`` if the policy does not.
        looked_up: Drafts that the drafter has found in the text.
        sampler: What tokens are sampled with; ``None`` takes the argmax.
        return_distributions: Whether the distributions on both sides of the verification are wanted.
    """

    token: Int[Tensor, " B"]
    limits: Int[Tensor, " B"]
    num_drafts: int
    num_by_heads: int
    drafter: Drafter | None
    chooser: DepthChooser | None
    looked_up: LookedUp | None
    sampler: RoundSampler | None
    return_distributions: bool


class RoundOutputs(NamedTuple):
    """What a round computes.

    Attributes:
        packed: ``(B, K + 4)``, what :func:`~mtp_modules.decoders.results.pack_result` returns.
        path: ``(B, P)``, in a tree: places in the chunk of the root and the accepted drafts.
        distributions: If they are wanted.
    """

    packed: Int[Tensor, "B M"]
    path: Int[Tensor, "B P"] | None = None
    distributions: RoundDistributions | None = None


def draft_and_verify(
    inputs: RoundInputs,
    heads: Heads,
    heads_state: DecodingState,
    embed: Callable[[Tensor], Tensor],
    unembedding: Unembedding,
    read: Reader,
) -> RoundOutputs:
    """Draft tokens, let the trunk read them, and decide which are accepted.

    Tensor operations only, if drafter and acceptance are: the model as it is and the compiled model both run this.

    Args:
        inputs: What the round starts from.
        heads: Of the model.
        heads_state: Theirs, committed.
        embed: Embeds token ids.
        unembedding: Of the model.
        read: Appends a chunk to the states.
    """
    token, sampler = inputs.token, inputs.sampler
    # 1. Draft: tokens that may follow the one emitted last, which the trunk has not read yet.
    draft = Draft(token[:, None][:, :0])
    if inputs.drafter is not None and inputs.num_drafts:
        draft = inputs.drafter.draft(
            DraftingContext(
                token=token,
                num_drafts=inputs.num_drafts,
                num_by_heads=inputs.num_by_heads,
                limits=inputs.limits,
                sampler=sampler,
                chooser=inputs.chooser,
                return_probs=inputs.return_distributions,
                looked_up=inputs.looked_up,
                heads=heads,
                heads_state=heads_state,
                embed=embed,
                unembed=unembedding.logits,
                vocab_size=len(unembedding.weight),
            )
        )
    if draft.counts is None:
        counts = inputs.limits.clamp(max=draft.tokens.shape[1] if draft.parents is None else draft.depth)
    else:
        counts = torch.minimum(draft.counts, inputs.limits)
    # 2. Read: one forward pass over the last token and all drafts.
    chunk = torch.cat((token[:, None], draft.tokens), dim=1)
    logits = read(chunk, draft)
    # 3. Verify: which drafts are accepted, and the model's own token after them. (4. The loop commits them.)
    if draft.parents is not None:
        return _verify_tree(chunk, draft, draft.parents, counts, logits, sampler)
    if sampler is None:
        tokens, accepted = greedy_round(draft.tokens, counts, logits)
        scores, target_probs = logits, None
    else:
        tokens, accepted, scores, target_probs = sampler.verify(draft, counts, logits)
    packed = pack_result(tokens, accepted, counts, scores)
    if not inputs.return_distributions:
        return RoundOutputs(packed)
    draft_probs = one_hot(draft.tokens, logits.shape[2]).double() if draft.probs is None else draft.probs
    target_probs = logits.double().softmax(dim=-1) if target_probs is None else target_probs
    return RoundOutputs(packed, distributions=RoundDistributions(draft.tokens, draft_probs, target_probs))


def _verify_tree(
    chunk: Int[Tensor, "B C"],
    draft: Draft,
    parents: Int[Tensor, "B K"],
    counts: Int[Tensor, " B"],
    logits: Float[Tensor, "B C V"],
    sampler: RoundSampler | None,
) -> RoundOutputs:
    """Follow the model's own choices through a tree, as far as each row's limit."""
    places = torch.cat((torch.full_like(parents[:, :1], -1), parents), dim=1)
    own, scores = (logits.argmax(dim=-1), logits) if sampler is None else sampler.own_choices(chunk, places, logits)
    tokens, path, accepted = walk(chunk, places, own, draft.depth)
    accepted = torch.minimum(accepted, counts)
    return RoundOutputs(pack_result(tokens, accepted, counts, scores), path)
