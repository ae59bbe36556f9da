"""The one decoding loop: draft, read, verify, commit. Plain decoding is the loop with no drafts.

The first three steps are one body, :func:`mtp_modules.decoders.round.draft_and_verify`, which an
:class:`~mtp_modules.decoders.graphs.executor.Executor` runs. The loop commits what was accepted, emits it, and lets
rows end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mtp_modules.core.selection import holes_filled
from mtp_modules.core.shapes import Array, Int, Tensor
from mtp_modules.decoders.drafting.drafter import Drafter
from mtp_modules.decoders.drafting.policies import DepthChooser, DraftPolicy, now
from mtp_modules.decoders.drafting.text import Text
from mtp_modules.decoders.graphs.executor import Executor, padded
from mtp_modules.decoders.request import Request
from mtp_modules.decoders.results import (
    Round,
    RoundArrays,
    RoundDistributions,
    RoundResult,
    depth_of,
    emitted_of,
    pack_result,
    unpack_result,
)
from mtp_modules.decoders.round import RoundInputs, RoundOutputs
from mtp_modules.decoders.sampling.batch import BatchSampling, History
from mtp_modules.decoders.sampling.stopping import Endings
from mtp_modules.decoders.verification.round_sampler import RoundSampler
from mtp_modules.decoders.verification.rules import Acceptance


@dataclass(frozen=True)
class Speculation:
    """How a run drafts and verifies.

    Attributes:
        drafter: Where drafts come from; ``None`` for plain decoding.
        acceptance: Which drafts are accepted.
        policy: How many tokens are drafted.
        most: Most drafts of a round, one after the other.
        return_distributions: Whether rounds have the distributions of drafts and model; not with a tree.
    """

    drafter: Drafter | None
    acceptance: Acceptance
    policy: DraftPolicy
    most: int
    return_distributions: bool = False


def rounds(executor: Executor, request: Request, how: Speculation) -> Iterator[Round]:
    """Yield the rounds of a run."""
    run = _Run(executor, request, how)
    depths = how.policy.start(how.most)
    endings = Endings(request.ends(executor.trunk), request.stops, request.prompts)
    rows, result = np.arange(len(request.prompts)), run.read_prompts()
    while True:
        # Emit what was committed, cut where a row ends.
        counts, reasons, any_ends = endings.cut(result.tokens, result.counts)
        accepted, last = np.minimum(result.accepted, counts), result.tokens[np.arange(len(rows)), counts - 1]
        yield Round(RoundArrays(rows, result.tokens, counts, accepted, result.drafted, reasons), run.distributions)
        if any_ends:
            going_on = holes_filled(np.flatnonzero(reasons == 0))
            if not going_on:
                return
            run.select(going_on)
            endings.select(going_on)
            rows, last = rows[going_on], last[going_on]
        # Draft, read, verify, commit: one forward pass of the trunk.
        started = now()
        wanted = depths.depth(len(rows)) if how.drafter is not None else 0
        reach = how.drafter.reach(wanted) if how.drafter is not None else 0
        result, drafted = run.round(last, endings.useful(reach), wanted, depths)
        depths.learn(len(rows), drafted, result.accepted, result.drafted, now() - started)


class _Run:
    """The tensors of one run: states of trunk and heads, and what sampling and drafting look at."""

    def __init__(self, executor: Executor, request: Request, how: Speculation) -> None:
        self.executor, self.prompts, self.how, self.live = executor, request.prompts, how, len(request.prompts)
        trunk, self.device = executor.trunk, executor.unembedding.weight.device
        longest, drafter = max(len(prompt) for prompt in request.prompts), how.drafter
        length = longest + max(request.budgets)
        if trunk.max_positions is not None:
            length = min(length, trunk.max_positions)
        capacity = length + (0 if drafter is None else drafter.chunk_size(how.most))
        with torch.inference_mode():
            params = BatchSampling(request.sampling, trunk.vocab_size, self.device)
            # Without parameters of its own and without a lossy rule, the argmax is all there is to do.
            self.params = None if params.greedy and how.acceptance.lossless else params
            uses_heads = drafter is not None and drafter.uses_heads
            self.states = executor.new_states(self.live, capacity, longest=longest, for_drafts=uses_heads)
            self.seeds = torch.tensor(request.seeds, device=self.device)
            self.history = History(self.prompts, trunk.vocab_size, self.device) if params.penalises else None
            reads_text = drafter is not None and drafter.reads_text
            self.text = Text(self.live, 2 * longest, self.device) if reads_text else None
        self.distributions: RoundDistributions | None = None

    @torch.inference_mode()
    def read_prompts(self) -> RoundResult:
        """Read all prompts, and sample the first new token of each."""
        logits = self.executor.read_prompts(self.prompts, self.states)
        sampler = self._sampler(unread=0, most=1)
        if sampler is None:
            tokens, scores, probs = logits.argmax(dim=-1), logits, None
        else:
            scores = sampler.scores(logits, None)
            probs = sampler.params.probs(scores)
            tokens = sampler.noise.sample(probs)
        if self.how.return_distributions:
            probs = logits.double().softmax(dim=-1) if probs is None else probs
            self.distributions = RoundDistributions(tokens[:, :0], probs[:, :0], probs)
        if self.text is not None:
            lengths = torch.tensor(self.states.lengths, device=self.device)
            self.text.append(padded(self.prompts, max(self.states.lengths), self.device), lengths)
        none = torch.zeros_like(self.seeds)
        packed = pack_result(tokens, none, none, scores)
        self._append(packed)
        self.select(list(range(self.live)))
        return unpack_result(packed, self.live)

    @torch.inference_mode()
    def round(
        self, last: Int[Array, " B"], limits: Int[Array, " B"], wanted: int, chooser: DepthChooser
    ) -> tuple[RoundResult, int]:
        """Run a round and commit what was accepted; return its result, and how many drafts were made in a row."""
        drafter, looked_up = self.how.drafter, None
        reach = drafter.reach(wanted) if drafter is not None else 0
        num_drafts = self.executor.num_drafts(int(limits.max()), reach, len(self.states.lengths))
        by_heads = min(num_drafts, wanted)
        if drafter is not None and self.text is not None and num_drafts:
            looked_up = drafter.look_up(self.text, num_drafts)
            if looked_up is not None:
                drafter, num_drafts = drafter.for_round(looked_up, by_heads)
        outputs = self.executor.round(
            RoundInputs(
                token=self._on_device(last),
                limits=self._on_device(limits),
                num_drafts=num_drafts,
                num_by_heads=by_heads,
                drafter=drafter,
                chooser=chooser if chooser.watches else None,
                looked_up=looked_up,
                sampler=self._sampler(unread=1, most=num_drafts + 1),
                return_distributions=self.how.return_distributions,
            ),
            self.states,
        )
        return self._commit(outputs), depth_of(outputs.packed)

    def _commit(self, outputs: RoundOutputs) -> RoundResult:
        """4. Commit: keep the last token and the accepted drafts in the states, and forget the others."""
        self._append(outputs.packed)
        result = unpack_result(outputs.packed, len(outputs.packed))
        self.states.commit(result.counts.tolist(), outputs.path)
        if outputs.distributions is not None:
            kept = outputs.distributions
            self.distributions = RoundDistributions(
                *(part[: self.live] for part in (kept.drafts, kept.draft_probs, kept.target_probs))
            )
        return result if len(result.counts) == self.live else RoundResult(*(part[: self.live] for part in result))

    def _append(self, packed: Int[Tensor, "B M"]) -> None:
        """Append new tokens to what penalties and lookup read."""
        for part in (self.history, self.text):
            if part is not None:
                part.append(*emitted_of(packed))

    def _on_device(self, numbers: Int[Array, " N"]) -> Int[Tensor, " B"]:
        """Return numbers as a tensor, one a row of the states; rows that fill the batch get the first."""
        spare = len(self.states.lengths) - self.live
        numbers = np.pad(numbers, (0, spare), constant_values=numbers[0]) if spare else numbers
        return torch.from_numpy(numbers).to(self.device)

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only, and with copies of the first where the executor wants a fuller batch."""
        size = self.executor.batch_size(len(rows))
        if len(rows) == self.live and size == len(self.states.lengths):
            return
        self.live, rows = len(rows), [*rows, *rows[:1] * (size - len(rows))]
        self.states.select(rows)
        self.seeds = self.seeds[rows]
        self.params = None if self.params is None else self.params.select(rows)
        for part in (self.history, self.text):
            if part is not None:
                part.select(rows)

    def _sampler(self, unread: int, most: int) -> RoundSampler | None:
        """Return what the tokens of a round, ``most`` a row, are sampled with; ``None`` if the argmax is taken."""
        if self.params is None:
            return None
        positions = torch.tensor(self.states.lengths, device=self.device) + unread
        noise = self.executor.noise(self.seeds, positions, most)
        return RoundSampler(self.params, self.how.acceptance, noise, self.history)
