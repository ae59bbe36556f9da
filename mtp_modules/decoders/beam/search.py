"""The loop of every beam search: draft or not, read a chunk, take as many steps as the chunk has distributions for."""

from collections.abc import Iterator

import numpy as np

from mtp_modules.core.shapes import Array, Bool, Int
from mtp_modules.decoders.beam.hypotheses import ABSENT, NO_LIMIT, NO_TOKEN, Beam, BeamPlan, BeamRule, Hypotheses
from mtp_modules.decoders.beam.tensors import BeamTensors, Continuations, check_numbers
from mtp_modules.decoders.beam.trees import DraftTrees
from mtp_modules.decoders.request import DecodableModel, Request
from mtp_modules.decoders.results import Round, RoundArrays
from mtp_modules.decoders.sampling.batch import BatchSampling
from mtp_modules.decoders.sampling.stopping import GOES_ON


class BeamSearch:
    """A beam search for some prompts of a run.

    Args:
        model: Trunk, heads and unembedding.
        request: Of these prompts alone.
        prompts: Their numbers in the run.
        params: Of all prompts of the run; ``None`` where every token is allowed.
        plan: How to search.
    """

    def __init__(
        self, model: DecodableModel, request: Request, prompts: list[int], params: BatchSampling | None, plan: BeamPlan
    ) -> None:
        self.plan, self.rule = plan, BeamRule(plan, request.ends(model.trunk))
        self.tensors = BeamTensors(model, request, params, plan)
        # Of each prompt that goes on: its number, how many tokens the trunk can read behind it, and how many tokens
        # its unfinished hypotheses have.
        self.prompts: Int[Array, " B"] = np.array(prompts)
        limit = NO_LIMIT if model.trunk.max_positions is None else model.trunk.max_positions
        self.room: Int[Array, " B"] = limit - np.array([len(prompt) for prompt in request.prompts])
        self.lengths: Int[Array, " B"] = np.zeros_like(self.prompts)
        self.hypotheses = Hypotheses.empty(request.stops, request.prompts)
        self._ended: list[tuple[Int[Array, " B"], Hypotheses]] = []

    def beams(self) -> dict[int, list[Beam]]:
        """Return the final hypotheses of every prompt, best first; to be called when the search has ended."""
        return {
            prompt: beams
            for prompts, hypotheses in self._ended
            for prompt, beams in zip(prompts.tolist(), hypotheses.beams(self.plan.length_penalty), strict=True)
        }

    def rounds(self) -> Iterator[Round]:
        """Yield a round a forward pass, with the tokens that all hypotheses of a prompt have come to agree on."""
        settled = drafted = np.zeros_like(self.prompts)
        trees = DraftTrees(self.hypotheses, None, settled)
        steps = self._advance(self.tensors.read_prompts(self.hypotheses, self.prompts), trees)
        while True:
            hypotheses = self.hypotheses
            ended = np.logical_not(hypotheses.going_on.any(axis=1))
            until = np.where(ended, hypotheses.lengths[:, 0], hypotheses.agreed(int(settled.min())))
            counts = until - settled
            places = settled[:, None] + np.arange(counts.max())
            places = np.minimum(places, hypotheses.tokens.shape[2] - 1)
            tokens = hypotheses.tokens[np.arange(len(counts))[:, None], 0, places]
            reasons = np.where(ended, hypotheses.reasons[:, 0], GOES_ON)
            yield Round(RoundArrays(self.prompts, tokens, counts, steps - 1, drafted, reasons))
            settled = until[~ended]
            if ended.any():
                self._end(ended)
                if not len(settled):
                    return
            steps, drafted = self._round()

    def _end(self, ended: Bool[Array, " B"]) -> None:
        """Put away the prompts that have ended."""
        rows = np.flatnonzero(~ended)
        self._ended.append((self.prompts[ended], self.hypotheses.at(ended)))
        self.rule.ends.select(rows)
        self.hypotheses = self.hypotheses.at(rows)
        self.prompts, self.room, self.lengths = self.prompts[rows], self.room[rows], self.lengths[rows]

    def _round(self) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Draft, read and advance; return each prompt's steps, and how deep its drafts were."""
        self.tensors.begin(self.hypotheses, self.prompts)
        # The drafts of a prompt are cut at its own end, never at a neighbour's. But chunks are as long in all rows, and
        # what the trunk reads, which is all tokens but the last, must fit in each.
        useful = self.rule.ends.most - self.lengths - 1
        depth = min(self.plan.num_drafts, int(useful.max()), int((self.room - self.lengths).min()))
        drafted = np.minimum(useful, depth)
        drafts = self.tensors.draft(depth) if depth else None
        trees = DraftTrees(self.hypotheses, drafts, drafted, whole_blocks=self.plan.whole_blocks)
        steps = self._advance(self.tensors.read(trees), trees)
        kept = np.where(self.hypotheses.going_on.any(axis=1), steps, 1)  # the same for all hypotheses of a prompt
        self.tensors.states.commit(kept[trees.prompts].tolist())
        return steps, drafted

    def _advance(self, continuations: Continuations, trees: DraftTrees) -> Int[Array, " B"]:
        """Take as many steps as there are distributions for; return how many, for every prompt.

        A step needs the distribution after each hypothesis that is not finished, so each must be a node of a tree.
        """
        hypotheses = self.hypotheses.with_room(int(self.lengths.max()) + trees.chunks.shape[1])
        slots = np.arange(hypotheses.lengths.shape[1])
        hypotheses = hypotheses._replace(nodes=np.broadcast_to(slots, hypotheses.lengths.shape))
        steps = np.zeros_like(self.lengths)
        if self.plan.whole_blocks and trees.chunks.shape[1] > 1:
            hypotheses, steps = append_blocks(hypotheses, self.lengths, self.rule, continuations, trees)
        going_on, stepping = hypotheses.going_on, np.ones(len(steps), dtype=bool)
        while stepping.any():
            rows = trees.rows(steps, hypotheses.nodes)
            tokens, log_probabilities = continuations.after(rows, steps, going_on & stepping[:, None])
            best = self.rule.best(hypotheses._replace(rows=rows), tokens, log_probabilities, stepping)
            best = best._replace(nodes=trees.children(steps, best))
            hypotheses = best if stepping.all() else best.where(stepping, hypotheses)
            steps = steps + stepping
            going_on = hypotheses.going_on
            stepping = stepping & going_on.any(axis=1) & (~going_on | (hypotheses.nodes >= 0)).all(axis=1)
        self.hypotheses, self.lengths = hypotheses, self.lengths + steps
        return steps


def append_blocks(
    hypotheses: Hypotheses, lengths: Int[Array, " B"], rule: BeamRule, continuations: Continuations, trees: DraftTrees
) -> tuple[Hypotheses, Int[Array, " B"]]:
    """Replace the unfinished hypotheses by those that whole blocks of drafts make of them, cut where they end.

    No text comes twice, and none that is impossible for the model. Also returns how many drafts the blocks of each
    prompt have; a prompt of which no block is left keeps its hypotheses, and has 0.
    """
    there, rows = trees.blocks()
    drafts, nodes, depths = trees.chunks[rows][:, :, 1:], trees.slots[rows], trees.deepest[:, None]
    grown = hypotheses.at(np.arange(len(lengths))[:, None], nodes[:, :, 0])
    for place in range(drafts.shape[2]):
        inside = there & grown.going_on & (place < depths)
        grown = rule.grown(grown, np.where(inside, drafts[:, :, place], NO_TOKEN))
    taken = np.where(there, grown.lengths - lengths[:, None], 0)
    log_probabilities = continuations.reached[rows, taken]
    check_numbers(log_probabilities, there)
    # Two blocks are the same text if they are cut at the same draft.
    last = np.take_along_axis(nodes, taken[:, :, None], axis=2)[:, :, 0]
    same = (last[:, :, None] == last[:, None]) & (taken[:, :, None] == taken[:, None]) & there[:, None]
    possible = there & ~np.tril(same, -1).any(axis=2) & (log_probabilities > -np.inf)
    reasons = np.where(possible, grown.reasons, ABSENT)
    grown = grown._replace(log_probabilities=log_probabilities, reasons=reasons, nodes=last)
    some = possible.any(axis=1)
    reasons = np.where(hypotheses.going_on & some[:, None], ABSENT, hypotheses.reasons)
    return hypotheses._replace(reasons=reasons).beside(grown), np.where(some, trees.deepest, 0)
