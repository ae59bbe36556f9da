"""The tensors of a beam search: decoding states with a row a path, the model's continuations, the heads' drafts."""

from typing import NamedTuple

import numpy as np
import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Array, Bool, Float, Int, Shaped, Tensor
from mtp_modules.core.targets import horizon_of_draft
from mtp_modules.decoders.beam.hypotheses import RESOLUTION, BeamPlan, Hypotheses, length_scales
from mtp_modules.decoders.beam.trees import Drafts, DraftTrees
from mtp_modules.decoders.graphs.eager import EagerExecutor
from mtp_modules.decoders.request import DecodableModel, Request
from mtp_modules.decoders.sampling.batch import BatchSampling

_FAR = -(2.0**42)  # a rank so far below the best, 4096 nats, is as good as impossible, and times V still fits 64 bits


class Continuations(NamedTuple):
    """The best next tokens after every place of some rows, copied to the CPU.

    Attributes:
        tokens: The ``k`` best ones.
        log_probabilities: Of the hypotheses with them.
        reached: Log-probability of the hypothesis that ends at the place.
    """

    tokens: Int[Array, "R C k"]
    log_probabilities: Float[Array, "R C k"]
    reached: Float[Array, "R C"]

    def after(
        self, rows: Int[Array, "B W"], places: Int[Array, " B"], wanted: Bool[Array, "B W"]
    ) -> tuple[Int[Array, "B W k"], Float[Array, "B W k"]]:
        """Return the best next tokens of hypotheses that end at a place of a row, and their log-probabilities."""
        # What is not wanted may have any row and place, and gets numbers of no use.
        rows, ends = np.maximum(rows, 0), np.minimum(places, self.tokens.shape[1] - 1)[:, None]
        log_probabilities = self.log_probabilities[rows, ends]
        check_numbers(log_probabilities[:, :, 0], wanted)
        return self.tokens[rows, ends], log_probabilities


def check_numbers(log_probabilities: Float[Array, "B W"], wanted: Bool[Array, "B W"]) -> None:
    """Raise an error if the log-probability of a wanted hypothesis is NaN."""
    if (np.isnan(log_probabilities) & wanted).any():
        refuse("generate", "the model's logits are not numbers (NaN); check its weights and its precision.")


class BeamTensors:
    """A model and the states of its trunk and heads; the arguments are those of a :class:`BeamSearch`."""

    def __init__(self, model: DecodableModel, request: Request, params: BatchSampling | None, plan: BeamPlan) -> None:
        self.model, self.texts, self.params, self.plan = model, request.prompts, params, plan
        self.executor = EagerExecutor(model)
        self.device = model.unembedding.weight.device
        rows, longest = len(request.prompts), max(len(prompt) for prompt in request.prompts)
        capacity = longest + max(request.budgets) + plan.num_drafts
        if model.trunk.max_positions is not None:
            capacity = min(capacity, model.trunk.max_positions)
        with torch.inference_mode():
            self.states = self.executor.new_states(rows, capacity, longest=longest, for_drafts=plan.num_drafts > 0)

    @torch.inference_mode()
    def read_prompts(self, hypotheses: Hypotheses, prompts: Int[Array, " B"]) -> Continuations:
        """Read all prompts, a row each, and return the continuations of their empty hypotheses, at place 0."""
        logits = self.executor.read_prompts(self.texts, self.states)
        no_drafts = torch.zeros(len(prompts), 0, dtype=torch.long, device=self.device)
        return self._continuations(logits, no_drafts, hypotheses.at(slice(None), 0), prompts)

    @torch.inference_mode()
    def begin(self, hypotheses: Hypotheses, prompts: Int[Array, " B"]) -> None:
        """Start a round: from now on the heads' state has a row a root, which is an unfinished hypothesis."""
        self._hypotheses, self._prompts = hypotheses, prompts
        _select(self.states.heads, hypotheses.rows[hypotheses.going_on])

    @torch.inference_mode()
    def read(self, trees: DraftTrees) -> Continuations:
        """Read the chunks of the trees; from now on the states have a row a chunk."""
        index = trees.prompts, trees.slots[:, 0]
        roots = self._hypotheses.at(*index)
        _select(self.states.trunk, roots.rows)
        _select(self.states.heads, self._hypotheses.numbers[index])
        chunk = self._tensor(trees.chunks)
        drafts = chunk[:, 1:]
        logits = self.executor.read(chunk, Draft(drafts), self.states)
        return self._continuations(logits, drafts, roots, self._prompts[trees.prompts])

    def _continuations(
        self, logits: Float[Tensor, "R C V"], drafts: Int[Tensor, "R K"], roots: Hypotheses, prompts: Int[Array, " R"]
    ) -> Continuations:
        """Rank the next tokens of every place behind the root of each row: by score, then the smaller token."""
        log_probs = self._log_probs(logits, prompts)
        gained = log_probs[:, : drafts.shape[1]].gather(2, drafts[:, :, None])[:, :, 0]
        reached = torch.cat((self._tensor(roots.log_probabilities)[:, None], gained), dim=1).cumsum(dim=1)
        total = reached[:, :, None] + log_probs
        lengths = roots.lengths[:, None] + 1 + np.arange(log_probs.shape[1])
        scales = length_scales(lengths, self.plan.length_penalty)
        rank = (total / self._tensor(scales)[:, :, None] * RESOLUTION).round()
        below = (rank - rank.amax(dim=-1, keepdim=True)).clamp(min=_FAR).long()
        vocab_size = log_probs.shape[2]
        order = below * vocab_size - torch.arange(vocab_size, device=self.device)
        count = self.plan.num_beams
        best = order.topk(count, dim=-1).indices
        # One copy to the CPU instead of three.
        numbers = torch.cat((best.double(), total.gather(2, best), reached[:, :, None]), dim=2).cpu().numpy()
        return Continuations(numbers[:, :, :count].astype(np.int64), numbers[:, :, count:-1], numbers[:, :, -1])

    @torch.inference_mode()
    def draft(self, depth: int) -> Drafts:
        """Beam search over the heads' distributions: ``num_paths`` beams a prompt, ``depth`` tokens from its roots.

        The first ``num_beams`` of them are what a search with so many beams keeps, which a wider one need not contain.
        For whole blocks it is a plain search with ``num_paths`` beams.
        """
        heads, hypotheses, width = self.model.heads, self._hypotheses, self.plan.num_paths
        going_on = hypotheses.going_on
        # The first paths of a prompt are its hypotheses; minus infinity marks those that are finished.
        score = self._tensor(np.where(going_on, hypotheses.log_probabilities, -np.inf))
        owner, group = self._tensor(hypotheses.numbers), self._tensor(np.nonzero(going_on)[0])
        tokens = self._tensor(hypotheses.last()[going_on])[:, None]
        parents, states = torch.zeros_like(tokens), None
        kept = []
        for level in range(depth):
            # Each row of the heads' state, a root, is given all paths of its prompt; those that start from it count.
            states = heads.draft_states(
                tokens, self.states.heads, depth=level, before=states, parents=parents, embed=self.model.trunk.embedding
            )
            num_paths = owner.shape[1]
            own = states.expand(-1, num_paths, -1)[owner, torch.arange(num_paths, device=self.device)]
            index, _ = horizon_of_draft(heads.horizons, level)
            gained = self._log_probs(self.model.unembedding.logits(own, index), self._prompts)
            total = torch.where(score[:, :, None] > -torch.inf, score[:, :, None] + gained, -torch.inf)
            best = total.topk(width, dim=2)
            score, place = self._keep(best.values.flatten(1))
            token, parent = best.indices.flatten(1).gather(1, place), place // width
            owner, tokens = owner.gather(1, parent), token[group]
            parents = parent[group] if level else torch.zeros_like(tokens)  # a root has a single state at level 0
            kept.append(torch.stack((token.double(), parent.double(), score), dim=2))
        found = torch.stack(kept, dim=1).cpu().numpy()
        return Drafts(found[..., 0].astype(np.int64), found[..., 1].astype(np.int64), found[..., 2] > -np.inf)

    def _keep(self, values: Float[Tensor, "B N"]) -> tuple[Float[Tensor, "B S"], Int[Tensor, "B S"]]:
        """Return the best paths and their places: first of those that the first paths lead to, then of all others."""
        width = self.plan.num_paths
        num_first = width if self.plan.whole_blocks else self.plan.num_beams
        score, place = largest(values[:, : num_first * width], num_first)
        other_score, other_place = largest(values.scatter(1, place, -torch.inf), width - num_first)
        return torch.cat((score, other_score), dim=1), torch.cat((place, other_place), dim=1)

    def _log_probs(self, logits: Float[Tensor, "B N V"], prompts: Int[Array, " B"]) -> Float[Tensor, "B N V"]:
        scores = logits.double() if self.params is None else self.params.select(prompts.tolist()).scores(logits)
        return scores.log_softmax(dim=-1)

    def _tensor(self, numbers: Shaped[Array, " *N"]) -> Shaped[Tensor, " *N"]:
        return torch.from_numpy(numbers).to(self.device)


def largest(values: Float[Tensor, "B N"], count: int) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """Return the largest values and their places; of equal ones the first, where top-k would choose by ``N``."""
    ordered = values.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :count], ordered.indices[:, :count]


def _select(state: DecodingState, rows: Int[Array, " R"]) -> None:
    """Rearrange the rows of a state, one row may become several; without a copy where nothing changes."""
    if not np.array_equal(rows, np.arange(len(state.lengths))):
        state.select(rows.tolist())
