"""Hypotheses that grow by whole blocks of drafts, where a search chooses among those."""

import copy

import numpy as np

from mtp_modules.core.shapes import Array, Bool, Int, Shaped
from mtp_modules.decoders.beam.hypotheses import ABSENT, Hypotheses
from mtp_modules.decoders.beam.paths import Blocks
from mtp_modules.decoders.beam.tensors import Read
from mtp_modules.decoders.sampling.stopping import GOES_ON, STOP, EndTable


def with_blocks(
    hypotheses: Hypotheses, lengths: Int[Array, " B"], ends: EndTable, read: Read, blocks: Blocks
) -> tuple[Hypotheses, Bool[Array, " B"]]:
    """Replace the hypotheses that go on by those that whole blocks make, cut where they end.

    No text comes twice, and none that the model finds impossible; a prompt of which no block is left keeps its own.

    Args:
        hypotheses: At the start of the round, with room for all blocks.
        lengths: Of those that go on.
        ends: Where texts end.
        read: What the model says of the blocks.
        blocks: Of every prompt.

    Returns:
        The hypotheses, one a block behind those that there were; and which prompts have some with blocks.
    """
    there, depths, rows, drafts, slots = blocks
    prompts, places = np.arange(len(lengths))[:, None], np.arange(drafts.shape[2])
    grown = hypotheses.at(prompts, slots[:, :, 0])
    inside = (places < depths[:, None])[:, None] & there[:, :, None]
    stops = ends.stops(drafts) & inside
    if ends.any_watched:
        _watch(stops, grown.matchers, drafts, inside & ends.watched[:, None, None])
    stopped = stops.any(axis=2)
    taken = np.where(stopped, stops.argmax(axis=2) + 1, depths[:, None])
    log_probabilities = read.reached(rows, taken, there)
    # Two blocks are the same text if they are cut at the same draft.
    last = np.take_along_axis(slots, taken[:, :, None], axis=2)[:, :, 0]
    same = (last[:, :, None] == last[:, None]) & (taken[:, :, None] == taken[:, None]) & there[:, None]
    possible = there & ~np.tril(same, -1).any(axis=2) & (log_probabilities > -np.inf)
    np.put_along_axis(grown.tokens, lengths[:, None, None] + places[None, None], drafts, axis=2)
    grown = grown._replace(
        lengths=lengths[:, None] + taken,
        log_probabilities=log_probabilities,
        reasons=np.where(possible, np.where(stopped, STOP, GOES_ON), ABSENT),
    )
    some = possible.any(axis=1)
    reasons = np.where(hypotheses.going_on & some[:, None], ABSENT, hypotheses.reasons)
    return hypotheses._replace(reasons=reasons).beside(grown), some


def _watch(
    stops: Bool[Array, "B S K"],
    matchers: Shaped[Array, "B S"],
    drafts: Int[Array, "B S K"],
    wanted: Bool[Array, "B S K"],
) -> None:
    """Look for the first draft of every block that a matcher says ends it; tokenizers take one text at a time."""
    for block in map(tuple, np.argwhere(wanted.any(axis=2)).tolist()):
        matchers[block] = copy.copy(matchers[block])
        for place in np.flatnonzero(wanted[block]).tolist():
            if matchers[block].ends(int(drafts[(*block, place)])):
                stops[(*block, place)] = True
                break
