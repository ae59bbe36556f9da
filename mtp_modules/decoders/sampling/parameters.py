"""The law that tokens are drawn from: the model's own, sharpened, truncated and penalised as the user asks."""

import copy
from collections.abc import Sequence

import numpy as np
import torch

from mtp_modules.core.checks import at_least, fraction, refuse
from mtp_modules.core.component import Component
from mtp_modules.core.drafts import one_hot
from mtp_modules.core.shapes import Array, Bool, Float, Int, Tensor


class SamplingParams(Component):
    """How a row turns logits into the law that its tokens are drawn from.

    In this order: penalties, allowed tokens, temperature, top-k, top-p, min-p, each on what the one before has left.
    Drafts go through the same law, position by position, with the same history.

    Args:
        temperature: Logits are divided by it; 0 chooses the likeliest token.
        top_k: Keep the ``k`` likeliest tokens, and those that tie with the last of them; all if ``None``.
        top_p: Keep the fewest tokens, likeliest first, whose probabilities reach this sum (Holtzman et al. 2020, arXiv
            1904.09751).
        min_p: Keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
        repetition_penalty: Divide positive logits, and multiply negative ones, of every token in the prompt or output
            by it (Keskar et al. 2019, arXiv 1909.05858).
        presence_penalty: Subtract it from the logit of every token of the output.
        frequency_penalty: Subtract it once for every time that the token is in the output.
        allowed_tokens: Only these can be drawn; all if ``None``.

    Raises:
        ValueError: If a number lies outside its range, or no token is allowed.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        allowed_tokens: Sequence[int] | None = None,
    ) -> None:
        at_least(self, "temperature", temperature, 0)
        if top_k is not None:
            at_least(self, "top_k", top_k, 1)
        fraction(self, "top_p", top_p, zero=False)
        fraction(self, "min_p", min_p)
        if not repetition_penalty > 0:
            refuse(self, f"repetition_penalty must be above 0, got {repetition_penalty}.")
        for name, value in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            if not abs(value) < float("inf"):
                refuse(self, f"{name} must be a finite number, got {value}.")
        if allowed_tokens is not None and len(allowed_tokens) == 0:
            refuse(self, "allowed_tokens is empty; allow at least one token, or give null to allow all.")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty = repetition_penalty
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self.allowed_tokens = None if allowed_tokens is None else sorted(set(allowed_tokens))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token of the model itself is all that can be drawn."""
        return self.temperature == 0 and not self.penalises and self.allowed_tokens is None

    @property
    def penalises(self) -> bool:
        """Whether the law depends on what the row has read."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


GREEDY = SamplingParams(temperature=0.0)


class History:
    """How often each token is in the output of each row, and whether it is in its prompt.

    Args:
        prompts: One a row.
        vocab_size: Number ``V`` of token ids.
        device: Where the counts live.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self.prompted = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.prompted[row, torch.as_tensor(prompt, device=device)] = True
        self.emitted = torch.zeros(len(prompts), vocab_size, dtype=torch.long, device=device)

    def add(self, tokens: Int[Tensor, "B C"], lengths: Int[Tensor, " B"]) -> None:
        """Count what the rows have emitted.

        Args:
            tokens: New tokens.
            lengths: How many of them count, a row.
        """
        counts = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        self.emitted.scatter_add_(1, tokens, counts.long())

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only.

        Args:
            rows: Which, in their new order.
        """
        self.prompted, self.emitted = self.prompted[rows], self.emitted[rows]

    def after(self, drafts: Int[Tensor, "B K"]) -> Int[Tensor, "B C V"]:
        """Return the counts of the output before the first draft, after it, after the second, and so on; ``C = K + 1``.

        Args:
            drafts: Tokens that may follow.
        """
        steps = one_hot(drafts, self.emitted.shape[1])
        return torch.cat((self.emitted[:, None], self.emitted[:, None] + steps.cumsum(dim=1)), dim=1)


class BatchSampling:
    """The laws of all rows of a batch, as tensors.

    Args:
        laws: One a row.
        vocab_size: Number ``V`` of token ids.
        device: Where the tensors live.

    Raises:
        ValueError: If an allowed token is outside the vocabulary.
    """

    def __init__(self, laws: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device

        def column(values: Sequence[float]) -> Float[Tensor, "B 1 1"]:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None, None]

        self._temperature = column([law.temperature for law in laws])
        self._top_k = column([vocab_size if law.top_k is None else min(law.top_k, vocab_size) for law in laws]).long()
        self._top_p, self._min_p = column([law.top_p for law in laws]), column([law.min_p for law in laws])
        self._repetition = column([law.repetition_penalty for law in laws])
        self._presence = column([law.presence_penalty for law in laws])
        self._frequency = column([law.frequency_penalty for law in laws])
        self._allowed = self._mask(laws) if any(law.allowed_tokens is not None for law in laws) else None
        self._kinds: Bool[Array, "B 4"] = np.array(
            [
                (not law.greedy, law.penalises, law.top_k is not None or law.top_p < 1, law.allowed_tokens is not None)
                for law in laws
            ]
        )
        self._look()

    def _look(self) -> None:
        """Learn what there is to do for any row."""
        drawn, self.penalises, self._truncates, masks = (bool(kind.any()) for kind in self._kinds.T)
        self.greedy = not drawn
        self._allowed = self._allowed if masks else None

    def _mask(self, laws: Sequence[SamplingParams]) -> Tensor:
        mask = torch.ones(len(laws), 1, self.vocab_size, dtype=torch.bool, device=self.device)
        for row, law in enumerate(laws):
            if law.allowed_tokens is not None:
                wrong = [token for token in law.allowed_tokens if not 0 <= token < self.vocab_size]
                if wrong:
                    refuse(law, f"allowed_tokens holds {wrong[0]}, outside the vocabulary 0..{self.vocab_size - 1}.")
                mask[row] = False
                mask[row, 0, torch.tensor(law.allowed_tokens, device=self.device)] = True
        return mask

    def select(self, rows: list[int]) -> "BatchSampling":
        """Return the laws of some of the rows.

        Args:
            rows: Which, in their new order.
        """
        chosen = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Array)):
                setattr(chosen, name, value[rows])
        chosen._look()
        return chosen

    def scores(
        self,
        logits: Float[Tensor, "B C V"],
        emitted: Int[Tensor, "B _ V"] | None = None,
        prompted: Bool[Tensor, "B V"] | None = None,
    ) -> Float[Tensor, "B C V"]:
        """Return logits with penalties, minus infinity where a token is not allowed, float64.

        Args:
            logits: The model's, or a head's.
            emitted: How often each token is in the output before each position; needed where a law penalises.
            prompted: Whether a token is in the prompt; needed there too.
        """
        scores = logits.double()
        if self.penalises:
            assert emitted is not None
            assert prompted is not None
            scores = self._penalised(scores, emitted, prompted)
        return scores if self._allowed is None else scores.masked_fill(~self._allowed, -torch.inf)

    def __call__(self, scores: Float[Tensor, "B C V"]) -> Float[Tensor, "B C V"]:
        """Return the probabilities that tokens are drawn with.

        Where a draft's law has no allowed token left (few draft tokens), any token stands for it: the model, which has
        some, will reject that draft.

        Args:
            scores: What :meth:`scores` returned.
        """
        choice = one_hot(scores.argmax(dim=-1), self.vocab_size).double()
        cold = self._temperature == 0
        if self._allowed is not None:
            cold = cold | (scores.amax(dim=-1, keepdim=True) == -torch.inf)
        scores = scores / torch.where(self._temperature == 0, 1.0, self._temperature)
        if self._truncates:
            scores = self._truncated(scores)
        law = scores.softmax(dim=-1)
        law = torch.where(law < self._min_p * law.amax(dim=-1, keepdim=True), 0.0, law)
        law = law / law.sum(dim=-1, keepdim=True)
        return torch.where(cold, choice, law)

    def _penalised(self, scores: Tensor, emitted: Tensor, prompted: Tensor) -> Tensor:
        seen = (emitted > 0) | prompted[:, None]
        repeated = torch.where(scores > 0, scores / self._repetition, scores * self._repetition)
        scores = torch.where(seen, repeated, scores)
        return scores - self._presence * (emitted > 0) - self._frequency * emitted

    def _truncated(self, scores: Tensor) -> Tensor:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        last = ordered.gather(-1, (self._top_k - 1).expand(*scores.shape[:2], 1))
        ordered = ordered.masked_fill(ordered < last, -torch.inf)
        law = ordered.softmax(dim=-1)
        before = law.cumsum(dim=-1) - law
        ordered = ordered.masked_fill((before >= self._top_p) & (self._top_p < 1), -torch.inf)
        return torch.empty_like(scores).scatter_(-1, order, ordered)
