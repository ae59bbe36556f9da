"""Compile beforehand what decoding will need."""

import copy

from mtp_modules.core.checks import within_positions
from mtp_modules.core.interfaces import Heads
from mtp_modules.core.shapes import Bool, Float, Tensor
from mtp_modules.core.state import bucket_of
from mtp_modules.decoders.autoregressive import AutoregressiveDecoder
from mtp_modules.decoders.drafting.policies import DepthChooser, DraftPolicy
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
    depths, tried = [0], decoder
    if isinstance(decoder, SpeculativeDecoder):
        depths, tried = decoder.policy.depths(decoder.most(model)), copy.copy(decoder)
        tried.policy = _InTurn(policy=decoder.policy)
    within_positions("warm_up", longest, model.trunk.max_positions, "trunk")
    budget = 1 + sum(depth + 1 for depth in depths)
    first = 1 + max(model.heads.horizons)  # the first tokens of a text may have graphs of their own
    lengths = {first, *model.prompt_sizes}
    if model.static_memory:
        model.make_room(longest + max(depths))
        lengths |= {1 + length for length in range(longest) if bucket_of(1 + length) > bucket_of(max(length, 1))}
    for size in sorted(model.batch_sizes):
        for length in sorted(lengths):
            tried.generate(model, [[0] * length] * size, max_new_tokens=budget, sampling=sampling)
