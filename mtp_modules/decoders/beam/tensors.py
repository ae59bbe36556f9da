"""The tensors of a beam search: states whose rows fork, the best continuations of every place, drafts for all beams."""

from typing import NamedTuple

import numpy as np
import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Array, Bool, Float, Int, Shaped, Tensor
from mtp_modules.core.targets import horizon_of_draft
from mtp_modules.decoders.beam.hypotheses import RESOLUTION, BeamPlan, LengthScales
from mtp_modules.decoders.beam.paths import Drafts
from mtp_modules.decoders.graphs.eager import EagerExecutor
from mtp_modules.decoders.request import DecodableModel, Request
from mtp_modules.decoders.sampling.batch import BatchSampling

_FAR = -(2.0**42)  # a rank so far below the best, 4096 nats, is as good as impossible, and times V still fits 64 bits


class Roots(NamedTuple):
    """The hypotheses that go on, as the tensors see them; those of a prompt one after the other.

    Attributes:
        prompts: Which prompt each continues, of all prompts of the request.
        slots: Its place among the hypotheses of its prompt.
        rows: Row of the states in which its text up to the last token lies.
        tokens: Its last token, which the trunk has not read.
        log_probabilities: Of all its tokens.
        lengths: How many they are.
    """

    prompts: Int[Array, " N"]
    slots: Int[Array, " N"]
    rows: Int[Array, " N"]
    tokens: Int[Array, " N"]
    log_probabilities: Float[Array, " N"]
    lengths: Int[Array, " N"]


class Read:
    """The best continuations after every token of some chunks, copied to the CPU.

    Args:
        numbers: ``2 k + 1`` of them for each row and place: the ``k`` most likely tokens, the log-probabilities
            of the hypotheses with them, and the log-probability up to here.
    """

    def __init__(self, numbers: Float[Array, "R C _"]) -> None:
        self._numbers, self._most = numbers, numbers.shape[2] // 2

    def following(
        self, rows: Int[Array, "B W"], places: Int[Array, " B"], wanted: Bool[Array, "B W"]
    ) -> tuple[Int[Array, "B W k"], Float[Array, "B W k"]]:
        """Return the best continuations of hypotheses, and the log-probabilities with them.

        Args:
            rows: In which they lie; any number for what is not wanted.
            places: Of their last tokens in those rows, for the hypotheses of each prompt.
            wanted: Which count; the others' are of no use.

        Raises:
            ValueError: If the model's logits are not numbers.
        """
        places = np.minimum(places, self._numbers.shape[1] - 1)
        numbers = self._numbers[np.maximum(rows, 0), places[:, None]]
        log_probabilities = numbers[:, :, self._most : -1]
        _check_sound(log_probabilities[:, :, 0], wanted)
        return numbers[:, :, : self._most].astype(np.int64), log_probabilities

    def reached(
        self, rows: Int[Array, "B S"], places: Int[Array, "B S"], wanted: Bool[Array, "B S"]
    ) -> Float[Array, "B S"]:
        """Return the log-probability of hypotheses up to some places.

        Args:
            rows: In which they lie.
            places: In those rows.
            wanted: Which count.

        Raises:
            ValueError: If the model's logits are not numbers.
        """
        return _check_sound(self._numbers[rows, places, -1], wanted)


def _check_sound(numbers: Float[Array, "B W"], wanted: Bool[Array, "B W"]) -> Float[Array, "B W"]:
    if (np.isnan(numbers) & wanted).any():
        refuse("generate", "the model's logits are not numbers (NaN); check its weights and its precision.")
    return numbers


class BeamTensors:
    """A model and the states of its trunk and heads, one row a hypothesis or drafted path.

    Args:
        model: Trunk, heads and unembedding.
        request: Checked.
        params: Of the prompts; ``None`` where every token is allowed.
        plan: How to search.
        scales: What log-probabilities are divided by.
    """

    def __init__(
        self,
        model: DecodableModel,
        request: Request,
        params: BatchSampling | None,
        plan: BeamPlan,
        scales: LengthScales,
    ) -> None:
        self.model, self.prompts, self.params, self.plan, self.scales = model, request.prompts, params, plan, scales
        self.executor = EagerExecutor(model)
        self.device = model.unembedding.weight.device
        longest = max(len(prompt) for prompt in request.prompts)
        capacity = longest + max(request.budgets) + plan.num_drafts
        if model.trunk.max_positions is not None:
            capacity = min(capacity, model.trunk.max_positions)
        with torch.inference_mode():
            rows = len(request.prompts)
            self.states = self.executor.new_states(rows, capacity, longest=longest, for_drafts=plan.num_drafts > 0)

    @torch.inference_mode()
    def read_prompts(self) -> Read:
        """Read all prompts at once, and return what may follow each of them, at place 0."""
        lengths = [len(prompt) for prompt in self.prompts]
        logits = self.executor.read_prompts(self.prompts, self.states)
        rows = np.arange(len(lengths))
        zeros = np.zeros_like(rows)
        nothing = torch.zeros(len(lengths), 0, dtype=torch.long, device=self.device)
        roots = Roots(rows, zeros, rows, zeros, zeros.astype(np.float64), zeros)
        return self._read(logits, nothing, roots)

    @torch.inference_mode()
    def begin(self, roots: Roots) -> None:
        """Start a round: from now on the heads' state has one row a root.

        Args:
            roots: Of all prompts that go on.
        """
        self._roots = roots
        _select(self.states.heads, roots.rows)

    @torch.inference_mode()
    def read(self, roots: Int[Array, " R"], chunks: Int[Array, "R C"]) -> Read:
        """Read the roots' last tokens and drafts behind them; from now on the states have one row a chunk.

        Args:
            roots: Of each row; at least one row a root that shall go on.
            chunks: The root's last token, and drafts.
        """
        owners = Roots(*(part[roots] for part in self._roots))
        _select(self.states.trunk, owners.rows)
        _select(self.states.heads, roots)
        chunk = self._tensor(chunks)
        drafts = chunk[:, 1:]
        return self._read(self.executor.read(chunk, Draft(drafts), self.states), drafts, owners)

    def _tensor(self, numbers: Shaped[Array, " *N"]) -> Shaped[Tensor, " *N"]:
        return torch.from_numpy(numbers).to(self.device)

    def _log_probs(self, logits: Float[Tensor, "R C V"], prompts: Int[Array, " R"]) -> Float[Tensor, "R C V"]:
        scores = logits.double() if self.params is None else self.params.select(prompts.tolist()).scores(logits)
        return scores.log_softmax(dim=-1)

    def _read(self, logits: Float[Tensor, "R C V"], drafts: Int[Tensor, "R K"], roots: Roots) -> Read:
        """Rank the continuations of every place: by score, then the smaller token."""
        log_probs = self._log_probs(logits, roots.prompts)
        gained = log_probs[:, : drafts.shape[1]].gather(2, drafts[:, :, None])[:, :, 0]
        reached = torch.cat((self._tensor(roots.log_probabilities)[:, None], gained), dim=1).cumsum(dim=1)
        total = reached[:, :, None] + log_probs
        scales = self.scales(roots.lengths[:, None] + 1 + np.arange(log_probs.shape[1]))
        rank = (total / self._tensor(scales)[:, :, None] * RESOLUTION).round()
        below = (rank - rank.amax(dim=-1, keepdim=True)).clamp(min=_FAR).long()
        vocab_size = log_probs.shape[2]
        order = below * vocab_size - torch.arange(vocab_size, device=self.device)
        best = order.topk(self.plan.num_beams, dim=-1).indices
        numbers = torch.cat((best.double(), total.gather(2, best), reached[:, :, None]), dim=2)
        return Read(numbers.cpu().numpy())

    @torch.inference_mode()
    def draft(self, depth: int) -> Drafts:
        """Search by the heads' own distributions with ``num_paths`` beams a prompt, starting from all its roots.

        The first ``num_beams`` of them are what a search with so many beams would follow, which a wider search need not
        contain. Where whole blocks are wanted there are no such first ones.

        Args:
            depth: How many drafts one after the other.
        """
        width, roots = self.plan.num_paths, self._roots
        prompts, groups = np.unique(roots.prompts, return_inverse=True)
        group = self._tensor(groups)
        tokens = self._tensor(roots.tokens)[:, None]
        before = self._draft_states(tokens, 0, None, torch.zeros_like(tokens))
        score = self._tensor(roots.log_probabilities)[:, None] + self._guess(before, 0, roots.prompts)[:, 0]
        best = score.topk(width, dim=1)
        # All roots of a prompt compete: their candidates side by side, minus infinity where they are another prompt's.
        mine = group == torch.arange(len(prompts), device=self.device)[:, None]
        values = torch.where(mine[:, :, None], best.values, -torch.inf).flatten(1)
        score, place = self._keep(values, values.shape[1])
        owner, token = place // width, best.indices.flatten()[place]
        source = torch.zeros_like(owner)
        found = [(token, self._tensor(roots.slots)[owner], score)]
        slots = torch.arange(width, device=self.device)
        for level in range(1, depth):
            before = self._draft_states(token[group], level, before, source[group])
            own = before.expand(-1, width, -1)[owner, slots]
            gained = self._guess(own, level, prompts)
            best = (score[:, :, None] + gained).topk(width, dim=2)
            score, place = self._keep(best.values.flatten(1), width * self._num_first)
            token, source = best.indices.flatten(1).gather(1, place), place // width
            owner = owner.gather(1, source)
            found.append((token, source, score))
        depths = [torch.stack([part.double() for part in level], dim=2) for level in found]
        tokens, sources, scores = np.moveaxis(torch.stack(depths, dim=1).cpu().numpy(), 3, 0)
        return Drafts(tokens.astype(np.int64), sources.astype(np.int64), scores > -np.inf)

    @property
    def _num_first(self) -> int:
        return self.plan.num_paths if self.plan.whole_blocks else self.plan.num_beams

    def _keep(self, values: Float[Tensor, "G N"], num_first: int) -> tuple[Float[Tensor, "G W"], Int[Tensor, "G W"]]:
        """Return the best paths and their places: first of those that the first paths lead to, then of all others."""
        first = values[:, :num_first].topk(self._num_first, dim=1)
        others = values.scatter(1, first.indices, -torch.inf).topk(self.plan.num_paths - self._num_first, dim=1)
        return torch.cat((first.values, others.values), dim=1), torch.cat((first.indices, others.indices), dim=1)

    def _draft_states(
        self, tokens: Int[Tensor, "B N"], depth: int, before: Tensor | None, parents: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B _ D"]:
        return self.model.heads.draft_states(
            tokens, self.states.heads, depth=depth, before=before, parents=parents, embed=self.model.trunk.embedding
        )

    def _guess(self, states: Float[Tensor, "B N D"], depth: int, prompts: Int[Array, " B"]) -> Float[Tensor, "B N V"]:
        index, _ = horizon_of_draft(self.model.heads.horizons, depth)
        return self._log_probs(self.model.unembedding.logits(states, index), prompts)


def _select(state: DecodingState, rows: Int[Array, " R"]) -> None:
    """Rearrange the rows of a state, without a copy where nothing changes."""
    if not np.array_equal(rows, np.arange(len(state.lengths))):
        state.select(rows.tolist())
