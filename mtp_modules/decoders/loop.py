"""The one decoding loop: read a chunk, choose, keep what holds, emit. Plain decoding is the loop with no drafts."""

from collections.abc import Collection, Iterator, Sequence

import torch

from mtp_modules.core.checks import at_least, refuse, tokens_in_vocabulary
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.acceptance import accept_greedy
from mtp_modules.decoders.generation import DecodableModel, Round


def greedy_rounds(
    model: DecodableModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_drafts: int,
    max_new_tokens: int,
    stop_tokens: Collection[int],
) -> Iterator[Round]:
    """Yield the rounds of greedy decoding.

    Args:
        model: Trunk, heads and unembedding.
        prompts: Token ids, of any lengths.
        num_drafts: Most drafts ``K`` a round.
        max_new_tokens: Budget of each prompt.
        stop_tokens: Tokens that end a row.
    """
    _check(model, prompts, max_new_tokens)
    run = _Run(model, prompts, num_drafts, max_new_tokens)
    budgets = [max_new_tokens] * len(prompts)
    rows, chosen, accepted, drafted = list(range(len(prompts))), run.read_prompts(), [0] * len(prompts), 0
    while True:
        tokens, reasons = [], []
        for index, row in enumerate(rows):
            kept, reason = _cut(chosen[index][: accepted[index] + 1], budgets[row], stop_tokens)
            budgets[row] -= len(kept)
            tokens.append(kept)
            reasons.append(reason or ("context" if run.room(index) < 1 else None))
        used = [min(taken, len(kept)) for taken, kept in zip(accepted, tokens, strict=True)]
        yield Round(rows, tokens, used, drafted, reasons)
        going_on = [index for index, reason in enumerate(reasons) if reason is None]
        if not going_on:
            return
        if len(going_on) < len(rows):
            run.select(going_on)
            rows = [rows[index] for index in going_on]
        last = [tokens[index][-1] for index in going_on]
        drafted = run.num_drafts(max(budgets[row] for row in rows))
        chosen, accepted = run.round(last, drafted)


def _check(model: DecodableModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    at_least("generate", "max_new_tokens", max_new_tokens, 1)
    if not prompts:
        refuse("generate", "prompts is empty; give at least one.")
    limit = model.trunk.max_positions
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            refuse("generate", f"prompt {row} is empty; give at least one token.")
        if limit is not None and len(prompt) > limit:
            refuse(
                "generate",
                f"prompt {row} has {len(prompt)} tokens, the trunk reads at most max_positions={limit}; "
                "shorten the prompt.",
            )
        tokens_in_vocabulary("generate", torch.as_tensor(prompt), model.trunk.vocab_size)


def _cut(tokens: list[int], budget: int, stop_tokens: Collection[int]) -> tuple[list[int], str | None]:
    """Cut at the budget, and after the first stop token within it."""
    tokens = tokens[:budget]
    for index, token in enumerate(tokens):
        if token in stop_tokens:
            return tokens[: index + 1], "stop"
    return tokens, "length" if len(tokens) == budget else None


class _Run:
    """The tensors of one run: a model and the states of its trunk and heads."""

    def __init__(self, model: DecodableModel, prompts: Sequence[Sequence[int]], num_drafts: int, budget: int) -> None:
        self.model, self.prompts, self.most_drafts = model, prompts, num_drafts
        self.embed, self.unembedding = model.trunk.embedding, model.unembedding
        self.device = self.unembedding.weight.device
        self.limit = model.trunk.max_positions
        longest = max(len(prompt) for prompt in prompts)
        capacity = longest + budget + num_drafts
        if self.limit is not None:
            capacity = min(capacity, self.limit)
        with torch.inference_mode():
            self.trunk_state = model.trunk.new_state(len(prompts), capacity)
            self.heads_state = model.heads.new_state(len(prompts), capacity, for_drafts=num_drafts > 0)

    @torch.inference_mode()
    def read_prompts(self) -> list[list[int]]:
        """Read all prompts at once, and return the first new token of each."""
        lengths = [len(prompt) for prompt in self.prompts]
        chunk = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            chunk[row, : len(prompt)] = torch.as_tensor(prompt)
        states = self._extend(chunk.to(self.device))
        last = torch.tensor(lengths, device=self.device) - 1
        states = states[torch.arange(len(lengths), device=self.device), last]
        self._commit(lengths)
        first: list[list[int]] = self._choose(states)[:, None].tolist()
        return first

    @torch.inference_mode()
    def round(self, last: list[int], num_drafts: int) -> tuple[list[list[int]], list[int]]:
        """Draft after the last token of every row, verify, and keep what holds.

        Args:
            last: The token that each row emitted last.
            num_drafts: How many drafts ``K``.

        Returns:
            The model's own choices after each token of the chunk, and how many drafts they confirm.
        """
        chunk = torch.tensor(last, device=self.device)[:, None]
        if num_drafts == 0:
            choices = self._choose(self._extend(chunk))
            self._commit([1] * len(last))
            return choices.tolist(), [0] * len(last)
        draft = self.model.heads.draft(
            chunk[:, 0],
            self.heads_state,
            num_drafts=num_drafts,
            embed=self.embed,
            unembed=self.unembedding.logits_by_horizon,
        )
        choices = self._choose(self._extend(torch.cat((chunk, draft.tokens), dim=1)))
        accepted = accept_greedy(draft.tokens, choices)
        on_host = torch.cat((choices, accepted[:, None]), dim=1).tolist()
        kept = [row.pop() for row in on_host]
        self._commit([count + 1 for count in kept])
        return on_host, kept

    def room(self, index: int) -> int:
        """Return how many more tokens a row can read.

        Args:
            index: Row of the states.
        """
        return 1 << 62 if self.limit is None else self.limit - self.trunk_state.lengths[index]

    def num_drafts(self, budget: int) -> int:
        """Return how many drafts the next round can use: no more than the budget and the trunk's positions allow.

        Args:
            budget: Most tokens that a row may still emit.
        """
        room = min(self.room(index) for index in range(len(self.trunk_state.lengths)))
        return max(0, min(self.most_drafts, budget - 1, room - 1))

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only.

        Args:
            rows: Which, in their new order.
        """
        self.trunk_state.select(rows)
        self.heads_state.select(rows)

    def _extend(self, chunk: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        hidden = self.model.trunk(chunk, state=self.trunk_state).hidden
        return self.model.heads.extend(hidden, self.heads_state)

    def _commit(self, keep: list[int]) -> None:
        self.trunk_state.commit(keep)
        self.heads_state.commit(keep)

    def _choose(self, states: Tensor) -> Tensor:
        return self.unembedding.logits(states).argmax(dim=-1)
