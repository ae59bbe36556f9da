"""Compile beforehand what decoding will need."""

import copy

import torch

from mtp_modules.core.checks import within_positions
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.shapes import Bool, Float, Tensor
from mtp_modules.core.state import bucket_of
from mtp_modules.decoders.autoregressive import AutoregressiveDecoder
from mtp_modules.decoders.drafting.drafter import Drafter, DraftingContext
from mtp_modules.decoders.drafting.policies import DepthChooser, DraftPolicy
from mtp_modules.decoders.drafting.text import LookedUp, Text
from mtp_modules.decoders.graphs.compiled import CompiledModel
from mtp_modules.decoders.sampling.parameters import SamplingParams
from mtp_modules.decoders.speculative import SpeculativeDecoder


class _InTurn(DraftPolicy):
    """Draft every number of tokens that a policy may ask for, one round each."""

    def __init__(self, *, policy: DraftPolicy) -> None:
        self.policy = policy

    def start(self, most: int) -> DepthChooser:
        return _Turns(self.policy.start(most), self.policy.depths(most))

    def check(self, heads: Heads) -> None:
        self.policy.check(heads)


class _Turns(DepthChooser):
    def __init__(self, inner: DepthChooser, depths: list[int]) -> None:
        super().__init__(inner.most)
        self.inner, self.depths = inner, list(depths)
        self.watches, self.predicted = inner.watches, inner.predicted

    def depth(self, rows: int) -> int:
        return self.depths.pop(0) if len(self.depths) > 1 else self.depths[0]

    def goes_on(self, confidence: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
        return self.inner.goes_on(confidence) | True  # as many drafts as this round is to have


class _Always(Drafter):
    """Let one part of a drafter draft in every round, as if the text had something for it.

    Args:
        drafter: The whole.
        part: Drafts; nobody if ``None``.
    """

    def __init__(self, *, drafter: Drafter, part: Drafter | None) -> None:
        self.drafter, self.part = drafter, part
        self.uses_heads, self.reads_text = drafter.uses_heads, drafter.reads_text

    def limits(self, heads: Heads) -> tuple[int, int | None]:
        return self.drafter.limits(heads)

    def check(self, trunk: Trunk, heads: Heads) -> None:
        self.drafter.check(trunk, heads)

    def reach(self, num_drafts: int) -> int:
        return self.drafter.reach(num_drafts)

    def chunk_size(self, num_drafts: int) -> int:
        return self.drafter.chunk_size(num_drafts)

    def look_up(self, text: Text, num_drafts: int) -> LookedUp | None:
        found = self.drafter.look_up(text, num_drafts)
        return None if found is None else LookedUp(found.tokens, torch.full_like(found.counts, num_drafts))

    def for_round(self, looked_up: LookedUp, num_drafts: int) -> tuple[Drafter | None, int]:
        if self.part is None:
            return None, 0
        return self.part, looked_up.tokens.shape[1] if self.part.reads_text else num_drafts

    def draft(self, context: DraftingContext) -> Draft:
        return self.drafter.draft(context)  # nothing was looked up


def _in_turn(decoder: SpeculativeDecoder, rows: int, *, on_cpu: bool) -> list[SpeculativeDecoder]:
    """Return decoders that draft every number of tokens that the policy may ask for, one for each part of the drafter.

    Args:
        decoder: What is warmed up.
        rows: Of the batch.
        on_cpu: Whether the model is on a CPU.
    """
    made = []
    for part in decoder.drafter.parts(rows, on_cpu=on_cpu):
        tried = copy.copy(decoder)
        tried.policy = _InTurn(policy=decoder.policy)
        if decoder.drafter.reads_text:
            tried.drafter = _Always(drafter=decoder.drafter, part=part)
        made.append(tried)
    return made


def warm_up(
    model: CompiledModel,
    decoder: AutoregressiveDecoder | SpeculativeDecoder,
    *,
    sampling: SamplingParams | None = None,
    longest: int = 1,
) -> None:
    """Compile all graphs that a decoder will use, so that no text has to wait for them.

    It decodes a few tokens with each number of drafts that the decoder's policy may ask for, in batches of all sizes
    that the model was compiled for.

    Args:
        model: What :func:`~mtp_modules.decoders.compile_for_decoding` has returned.
        decoder: Will decode.
        sampling: How tokens will be sampled; the argmax if ``None``. Penalties, truncation and allowed tokens have
            graphs of their own, so call this once for each such kind.
        longest: Where the model has static memory: how many tokens a text will have, prompt included. There are graphs
            for each size of texts up to that.

    Raises:
        ValueError: If the trunk cannot read so many.
    """
    depths, most = [0], 0
    if isinstance(decoder, SpeculativeDecoder):
        depths = decoder.policy.depths(decoder.most(model))
        most = decoder.drafter.chunk_size(max(depths))
    within_positions("warm_up", longest, model.trunk.max_positions, "trunk")
    budget = 1 + len(depths) * (most + 1)
    first = 1 + max(model.heads.horizons)  # the first tokens of a text may have graphs of their own
    lengths = {first, *model.prompt_sizes}
    if model.static_memory:
        model.make_room(longest + most)
        lengths |= {1 + length for length in range(longest) if bucket_of(1 + length) > bucket_of(max(length, 1))}
    on_cpu = model.unembedding.weight.device.type == "cpu"
    for size in sorted(model.batch_sizes):
        tried = [decoder] if not isinstance(decoder, SpeculativeDecoder) else _in_turn(decoder, size, on_cpu=on_cpu)
        for length in sorted(lengths):
            for each in tried:
                each.generate(model, [[0] * length] * size, max_new_tokens=budget, sampling=sampling)
