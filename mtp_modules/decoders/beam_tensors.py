"""The tensors of a beam search: states whose rows fork, the best continuations of every place, drafts for all beams."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import horizon_of_draft
from mtp_modules.decoders.generation import DecodableModel, Request
from mtp_modules.decoders.hypotheses import RESOLUTION, BeamPlan, Continuation, length_scale
from mtp_modules.decoders.prompts import in_one_tensor
from mtp_modules.decoders.sampling import RowLaws

_FAR = -(2.0**42)  # a rank so far below the best, 4096 nats, is as good as impossible, and times V still fits 64 bits


class Root(NamedTuple):
    """A hypothesis that goes on, as the tensors see it.

    Attributes:
        prompt: Which prompt it continues.
        row: Row of the states in which its text up to the last token lies.
        token: The last token, which nobody has read.
        log_probability: Of all its tokens.
        length: How many they are.
    """

    prompt: int
    row: int
    token: int
    log_probability: float
    length: int


class Path(NamedTuple):
    """Drafts one after the other.

    Attributes:
        root: Index of the root that they follow.
        tokens: The drafts.
    """

    root: int
    tokens: tuple[int, ...]


class Laws:
    """What the model says after every token of some chunks, on the host.

    Args:
        numbers: For each row and place ``2 k + 1`` numbers: the ``k`` likeliest tokens, the log-probabilities of the
            hypotheses with them, and the log-probability up to here.
    """

    def __init__(self, numbers: list[list[list[float]]]) -> None:
        self._numbers = numbers

    def following(self, row: int, place: int) -> list[Continuation]:
        """Return the best continuations.

        Args:
            row: Of the chunks.
            place: In the row.

        Raises:
            ValueError: If the model's logits are not numbers.
        """
        *numbers, _ = self._numbers[row][place]
        half = len(numbers) // 2
        _check_sound(numbers[half])
        return [Continuation(int(token), total) for token, total in zip(numbers[:half], numbers[half:], strict=True)]

    def reached(self, row: int, place: int) -> float:
        """Return the log-probability of the hypothesis up to a place.

        Args:
            row: Of the chunks.
            place: In the row.

        Raises:
            ValueError: If the model's logits are not numbers.
        """
        return _check_sound(self._numbers[row][place][-1])


def _check_sound(number: float) -> float:
    if math.isnan(number):
        refuse("generate", "the model's logits are not numbers (NaN); check its weights and its precision.")
    return number


class BeamTensors:
    """A model and the states of its trunk and heads, one row a hypothesis or drafted path.

    Args:
        model: Trunk, heads and unembedding.
        request: Checked.
        laws: Of the prompts; ``None`` where every token is allowed.
        plan: How to search.
    """

    def __init__(self, model: DecodableModel, request: Request, laws: RowLaws | None, plan: BeamPlan) -> None:
        self.model, self.prompts, self.laws, self.plan = model, request.prompts, laws, plan
        self.device = model.unembedding.weight.device
        longest = max(len(prompt) for prompt in request.prompts)
        capacity = longest + max(request.budgets) + plan.num_drafts
        if model.trunk.max_positions is not None:
            capacity = min(capacity, model.trunk.max_positions)
        scales = [1.0, *(length_scale(length, plan.length_penalty) for length in range(1, capacity + 2))]
        self.scales = torch.tensor(scales, dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            rows = len(request.prompts)
            self.trunk_state = model.trunk.new_state(rows, capacity)
            self.heads_state = model.heads.new_state(rows, capacity, for_drafts=plan.num_drafts > 0)
        self._roots: list[Root] = []

    @torch.inference_mode()
    def read_prompts(self) -> Laws:
        """Read all prompts at once, and return what may follow each of them, at place 0."""
        lengths = [len(prompt) for prompt in self.prompts]
        states = self._extend([list(prompt) for prompt in self.prompts])[0]
        last = states[torch.arange(len(lengths), device=self.device), torch.tensor(lengths, device=self.device) - 1]
        self.commit(lengths)
        nothing = torch.zeros(len(lengths), 0, dtype=torch.long, device=self.device)
        roots = [Root(prompt, prompt, 0, 0.0, 0) for prompt in range(len(lengths))]
        return self._laws(self.model.unembedding.logits(last[:, None]), nothing, roots)

    @torch.inference_mode()
    def begin(self, roots: list[Root]) -> None:
        """Start a round: from now on the heads' state has one row a root.

        Args:
            roots: Of all prompts; those of a prompt one after the other.
        """
        self._roots = roots
        _select(self.heads_state, [root.row for root in roots])

    @torch.inference_mode()
    def read(self, paths: list[Path]) -> Laws:
        """Read the roots' last tokens and drafts behind them; from now on the states have one row a path.

        Args:
            paths: At least one a root that shall go on.
        """
        owners = [self._roots[path.root] for path in paths]
        _select(self.trunk_state, [root.row for root in owners])
        _select(self.heads_state, [path.root for path in paths])
        chunks = [[root.token, *path.tokens] for root, path in zip(owners, paths, strict=True)]
        states, chunk = self._extend(chunks)
        return self._laws(self.model.unembedding.logits(states), chunk[:, 1:], owners)

    def commit(self, keep: list[int]) -> None:
        """Keep the first tokens of every row's chunk.

        Args:
            keep: How many, a row.
        """
        self.trunk_state.commit(keep)
        self.heads_state.commit(keep)

    def _extend(self, chunks: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "B T D"], Int[Tensor, "B T"]]:
        chunk = in_one_tensor(chunks, max(len(row) for row in chunks), self.device)
        output, embed = self.model.trunk(chunk, state=self.trunk_state), self.model.trunk.embedding
        given = self.model.heads.features_of(output)
        return self.model.heads.extend(output.hidden, self.heads_state, tokens=chunk, embed=embed, **given), chunk

    def _log_law(self, logits: Float[Tensor, "B C V"], prompts: list[int]) -> Float[Tensor, "B C V"]:
        scores = logits.double() if self.laws is None else self.laws.select(prompts).scores(logits)
        return scores.log_softmax(dim=-1)

    def _laws(self, logits: Float[Tensor, "B C V"], drafts: Int[Tensor, "B K"], roots: list[Root]) -> Laws:
        """Rank the continuations of every place: by score, then the smaller token."""
        log_law = self._log_law(logits, [root.prompt for root in roots])
        start = torch.tensor([root.log_probability for root in roots], dtype=torch.float64, device=self.device)
        gained = log_law[:, : drafts.shape[1]].gather(2, drafts[:, :, None])[:, :, 0]
        reached = torch.cat((start[:, None], gained), dim=1).cumsum(dim=1)
        total = reached[:, :, None] + log_law
        lengths = torch.tensor([root.length + 1 for root in roots], device=self.device)
        lengths = lengths[:, None] + torch.arange(log_law.shape[1], device=self.device)
        rank = (total / self.scales[lengths.clamp(max=len(self.scales) - 1)][:, :, None] * RESOLUTION).round()
        below = (rank - rank.amax(dim=-1, keepdim=True)).clamp(min=_FAR).long()
        vocab_size = log_law.shape[2]
        order = below * vocab_size - torch.arange(vocab_size, device=self.device)
        best = order.topk(self.plan.num_beams, dim=-1).indices
        numbers = torch.cat((best.double(), total.gather(2, best), reached[:, :, None]), dim=2)
        return Laws(numbers.tolist())

    @torch.inference_mode()
    def draft(self, depth: int) -> list[list[list[Path]]]:
        """Search the heads' own laws with ``num_paths`` beams a prompt, starting from all its roots.

        The first ``num_beams`` of them are what a search with so many beams would follow, which a wider search need not
        contain. Where whole blocks are wanted there are no such first ones.

        Args:
            depth: How many drafts one after the other.

        Returns:
            For every prompt that has a root and every depth the paths that were followed; where a path goes on, the
            longer path is in the next depth.
        """
        width, roots = self.plan.num_paths, self._roots
        prompts = sorted({root.prompt for root in roots})
        group = torch.tensor([prompts.index(root.prompt) for root in roots], device=self.device)
        start = torch.tensor([root.log_probability for root in roots], dtype=torch.float64, device=self.device)
        tokens = torch.tensor([[root.token] for root in roots], device=self.device)
        before = self._draft_states(tokens, 0, None, torch.zeros_like(tokens))
        score = start[:, None] + self._guess(before, 0, [root.prompt for root in roots])[:, 0]
        best = score.topk(width, dim=1)
        # All roots of a prompt compete: their candidates side by side, minus infinity where they are another prompt's.
        mine = group == torch.arange(len(prompts), device=self.device)[:, None]
        values = torch.where(mine[:, :, None], best.values, -torch.inf).flatten(1)
        score, place = self._keep(values, values.shape[1])
        owner, token = place // width, best.indices.flatten()[place]
        source = torch.zeros_like(owner)
        found = [(token, source, owner, score)]
        slots = torch.arange(width, device=self.device)
        for level in range(1, depth):
            before = self._draft_states(token[group], level, before, source[group])
            own = before.expand(-1, width, -1)[owner, slots]
            gained = self._guess(own, level, prompts)
            best = (score[:, :, None] + gained).topk(width, dim=2)
            score, place = self._keep(best.values.flatten(1), width * self._num_first)
            token, source = best.indices.flatten(1).gather(1, place), place // width
            owner = owner.gather(1, source)
            found.append((token, source, owner, score))
        levels = [torch.stack([part.double() for part in level], dim=2) for level in found]
        return [_paths(levels_of_prompt) for levels_of_prompt in torch.stack(levels, dim=1).tolist()]

    @property
    def _num_first(self) -> int:
        return self.plan.num_paths if self.plan.whole_blocks else self.plan.num_beams

    def _keep(self, values: Float[Tensor, "G N"], num_first: int) -> tuple[Float[Tensor, "G W"], Int[Tensor, "G W"]]:
        """Return the best paths and their places: first of those that the first paths lead to, then of all others."""
        first = values[:, :num_first].topk(self._num_first, dim=1).indices
        others = values.scatter(1, first, -torch.inf).topk(self.plan.num_paths - self._num_first, dim=1).indices
        place = torch.cat((first, others), dim=1)
        return values.gather(1, place), place

    def _draft_states(
        self, tokens: Int[Tensor, "B N"], depth: int, before: Tensor | None, parents: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B _ D"]:
        return self.model.heads.draft_states(
            tokens, self.heads_state, depth=depth, before=before, parents=parents, embed=self.model.trunk.embedding
        )

    def _guess(self, states: Float[Tensor, "B N D"], depth: int, prompts: list[int]) -> Float[Tensor, "B N V"]:
        index, _ = horizon_of_draft(self.model.heads.horizons, depth)
        return self._log_law(self.model.unembedding.logits(states, index), prompts)


def _select(state: DecodingState, rows: list[int]) -> None:
    """Rearrange the rows of a state, without a copy where nothing changes."""
    if rows != list(range(len(state.lengths))):
        state.select(rows)


def _paths(levels: list[list[list[float]]]) -> list[list[Path]]:
    """Spell out the paths of one prompt's drafts: token, place in the depth before, root and score of each."""
    found: list[list[Path]] = []
    before: dict[int, Path] = {}
    for level in levels:
        now: dict[int, Path] = {}
        for slot, (token, source, owner, score) in enumerate(level):
            if score > -float("inf"):  # else nothing like it is possible
                tokens = before[int(source)].tokens if found else ()
                now[slot] = Path(int(owner), (*tokens, int(token)))
        found.append(list(now.values()))
        before = now
    return found
