"""The loop of every beam search: draft or not, read a chunk, take as many steps as the chunk has distributions for."""

from collections.abc import Iterator

import numpy as np

from mtp_modules.core.shapes import Array, Bool, Int
from mtp_modules.decoders.beam.blocks import with_blocks
from mtp_modules.decoders.beam.hypotheses import Beam, BeamPlan, BeamRule, Hypotheses
from mtp_modules.decoders.beam.paths import Paths
from mtp_modules.decoders.beam.tensors import BeamTensors, Read, Roots
from mtp_modules.decoders.request import DecodableModel, Request
from mtp_modules.decoders.results import Round, RoundArrays
from mtp_modules.decoders.sampling.batch import BatchSampling
from mtp_modules.decoders.sampling.stopping import GOES_ON


class BeamSearch:
    """A search for all prompts of a request.

    Args:
        model: Trunk, heads and unembedding.
        request: Checked.
        params: Of its prompts; ``None`` where every token is allowed.
        plan: How to search.
    """

    def __init__(self, model: DecodableModel, request: Request, params: BatchSampling | None, plan: BeamPlan) -> None:
        self.plan, self.limit = plan, model.trunk.max_positions
        self.rule = BeamRule(plan, request.ends(model.trunk))
        self.tensors = BeamTensors(model, request, params, plan, self.rule.scales)
        # Of the prompts that go on, which of them they are, and how long their unfinished hypotheses have come to be.
        self.prompts: Int[Array, " B"] = np.arange(len(request.prompts))
        self.prompt_lengths: Int[Array, " B"] = np.array([len(prompt) for prompt in request.prompts])
        self.lengths: Int[Array, " B"] = np.zeros_like(self.prompts)
        self.hypotheses = Hypotheses.empty(request.stops, request.prompts)
        self._ended: list[tuple[Int[Array, " B"], Hypotheses]] = []

    def beams(self) -> list[list[Beam]]:
        """Return the final hypotheses of every prompt, best first; to be called when the search has ended."""
        found = {
            prompt: beams
            for prompts, hypotheses in self._ended
            for prompt, beams in zip(prompts.tolist(), hypotheses.beams(self.rule.scales), strict=True)
        }
        return [found[prompt] for prompt in range(len(found))]

    def rounds(self) -> Iterator[Round]:
        """Yield a round a forward pass, with the tokens that all hypotheses of a prompt have come to agree on."""
        settled = np.zeros_like(self.prompts)
        going_on = self.hypotheses.going_on
        paths = Paths(np.zeros_like(going_on, dtype=np.int64), going_on, None, settled)
        steps, drafted = self._advance(self.tensors.read_prompts(), paths), np.zeros_like(settled)
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
        self.rule.select(rows)
        self.hypotheses = self.hypotheses.at(rows)
        self.prompts, self.lengths = self.prompts[rows], self.lengths[rows]
        self.prompt_lengths = self.prompt_lengths[rows]

    def _round(self) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Read what the hypotheses need; return each prompt's steps, and how deep its drafts were."""
        hypotheses, going_on = self.hypotheses, self.hypotheses.going_on
        last = hypotheses.last()
        places, slots = np.nonzero(going_on)
        self.tensors.begin(
            Roots(
                prompts=self.prompts[places],
                slots=slots,
                rows=hypotheses.rows[going_on],
                tokens=last[going_on],
                log_probabilities=hypotheses.log_probabilities[going_on],
                lengths=self.lengths[places],
            )
        )
        # What a prompt drafts is cut at its own end, never at a neighbour's.
        useful = self.rule.ends.most - self.lengths - 1
        depth = self._depth(int(useful.max()))
        drafted = np.minimum(useful, depth)
        drafts = self.tensors.draft(depth) if depth else None
        paths = Paths(last, going_on, drafts, drafted, whole_blocks=self.plan.whole_blocks)
        steps = self._advance(self.tensors.read(paths.roots, paths.chunks), paths)
        kept = np.where(self.hypotheses.going_on.any(axis=1), steps, 1)  # the same for all hypotheses of a prompt
        self.tensors.states.commit(kept[paths.prompts].tolist())
        return steps, drafted

    def _depth(self, useful: int) -> int:
        """Return how many drafts one after the other are of use to some prompt, and fit into the trunk for all."""
        depth = min(self.plan.num_drafts, useful)
        if self.limit is not None:
            # All tokens but the last are read, and the chunk has that one and the drafts.
            depth = min(depth, self.limit - int((self.prompt_lengths + self.lengths).max()))
        return depth

    def _advance(self, read: Read, paths: Paths) -> Int[Array, " B"]:
        """Take as many steps as distributions are known for; return how many, for every prompt.

        Args:
            read: The best continuations, by the model.
            paths: Of which hypotheses and drafts.
        """
        hypotheses = self.hypotheses.with_room(int(self.lengths.max()) + paths.chunks.shape[1])
        steps = np.zeros_like(self.lengths)
        slots, rows = np.arange(hypotheses.lengths.shape[1]), paths.root_rows
        blocks = paths.blocks() if self.plan.whole_blocks else None
        if blocks is not None:
            hypotheses, some = with_blocks(hypotheses, self.lengths, self.rule.ends, read, blocks)
            steps = np.where(some, blocks.depths, 0)
            slots = np.concatenate((slots, np.arange(blocks.rows.shape[1])))
            rows = np.concatenate((rows, blocks.rows), axis=1)
        slots, prompts = np.broadcast_to(slots, rows.shape), np.arange(len(rows))[:, None]
        going_on, stepping = hypotheses.going_on, np.ones(len(steps), dtype=bool)
        while stepping.any():
            tokens, log_probabilities = read.following(rows, steps, going_on & stepping[:, None])
            best, parents, new = self.rule.best(hypotheses, rows, tokens, log_probabilities, stepping)
            slots, rows = paths.following(steps, slots[prompts, parents], new)
            hypotheses = best if stepping.all() else best.where(stepping, hypotheses)
            steps = steps + stepping
            going_on = hypotheses.going_on
            stepping = stepping & going_on.any(axis=1) & (~going_on | (rows >= 0)).all(axis=1)
        self.hypotheses = hypotheses
        self.lengths = self.lengths + steps
        return steps
