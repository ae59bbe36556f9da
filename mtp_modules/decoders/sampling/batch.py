"""The sampling parameters of all rows of a batch as tensors, and the token counts that penalties look at."""

import copy
from collections.abc import Sequence

import numpy as np
import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.drafts import one_hot
from mtp_modules.core.shapes import Array, Bool, Float, Int, Tensor
from mtp_modules.decoders.sampling.parameters import SamplingParams


class History:
    """How often each token is in the output of each row, and whether it is in its prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self.prompted = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.prompted[row, torch.as_tensor(prompt, device=device)] = True
        self.emitted = torch.zeros(len(prompts), vocab_size, dtype=torch.long, device=device)

    def append(self, tokens: Int[Tensor, "B C"], counts: Int[Tensor, " B"]) -> None:
        """Count what the rows have emitted."""
        counted = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        self.emitted.scatter_add_(1, tokens, counted.long())

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only."""
        self.prompted, self.emitted = self.prompted[rows], self.emitted[rows]

    def after(self, drafts: Int[Tensor, "B K"]) -> Int[Tensor, "B C V"]:
        """Return the counts of the output before the first draft, after it, and so on; ``C = K + 1``."""
        steps = one_hot(drafts, self.emitted.shape[1])
        return torch.cat((self.emitted[:, None], self.emitted[:, None] + steps.cumsum(dim=1)), dim=1)


class BatchSampling:
    """The sampling parameters of all rows of a batch, as tensors.

    Raises:
        ValueError: If an allowed token is outside the vocabulary.
    """

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device

        def column(values: Sequence[float]) -> Float[Tensor, "B 1 1"]:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None, None]

        self._temperature = column([row.temperature for row in params])
        self._top_k = column([vocab_size if row.top_k is None else min(row.top_k, vocab_size) for row in params]).long()
        self._top_p, self._min_p = column([row.top_p for row in params]), column([row.min_p for row in params])
        self._repetition = column([row.repetition_penalty for row in params])
        self._presence = column([row.presence_penalty for row in params])
        self._frequency = column([row.frequency_penalty for row in params])
        self._allowed = self._mask(params) if any(row.allowed_tokens is not None for row in params) else None
        self._kinds: Bool[Array, "B 4"] = np.array(
            [
                (
                    not row.greedy,
                    row.penalises,
                    row.top_k is not None or row.top_p < 1,
                    row.allowed_tokens is not None,
                    row.min_p > 0,
                )
                for row in params
            ]
        )
        self._note_kinds()

    def _note_kinds(self) -> None:
        """Note what there is to do for any row."""
        sampled, self.penalises, self._truncates, masks, self._has_min_p = (bool(kind.any()) for kind in self._kinds.T)
        self.greedy = not sampled
        self._allowed = self._allowed if masks else None

    def _mask(self, params: Sequence[SamplingParams]) -> Tensor:
        mask = torch.ones(len(params), 1, self.vocab_size, dtype=torch.bool, device=self.device)
        for row, of_row in enumerate(params):
            if of_row.allowed_tokens is not None:
                wrong = [token for token in of_row.allowed_tokens if not 0 <= token < self.vocab_size]
                if wrong:
                    refuse(of_row, f"allowed_tokens holds {wrong[0]}, outside the vocabulary 0..{self.vocab_size - 1}.")
                mask[row] = False
                mask[row, 0, torch.tensor(of_row.allowed_tokens, device=self.device)] = True
        return mask

    def select(self, rows: list[int]) -> "BatchSampling":
        """Return the parameters of some of the rows."""
        chosen = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Array)):
                setattr(chosen, name, value[rows])
        chosen._note_kinds()
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
            emitted: How often each token is in the output before each position; needed where a row penalises.
            prompted: Whether a token is in the prompt; needed there too.
        """
        scores = logits.double()
        if self.penalises:
            assert emitted is not None
            assert prompted is not None
            scores = self._penalised(scores, emitted, prompted)
        return scores if self._allowed is None else scores.masked_fill(~self._allowed, -torch.inf)

    def probs(self, scores: Float[Tensor, "B C V"]) -> Float[Tensor, "B C V"]:
        """Return the probabilities that tokens are sampled with.

        Where no score is finite (a head that can draft no allowed token, say), all probability is on one token; what
        the model itself says must be finite, which the loop checks.
        """
        best, argmax = scores.max(dim=-1, keepdim=True)
        cold = (self._temperature == 0) | ~best.isfinite()
        scores = (scores - best) / torch.where(self._temperature == 0, 1.0, self._temperature)
        if self._truncates:
            scores = self._truncated(scores)
        probs = scores.softmax(dim=-1)
        if self._has_min_p:
            probs = torch.where(probs < self._min_p * probs.amax(dim=-1, keepdim=True), 0.0, probs)
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return probs.masked_fill(cold, 0.0).scatter_add(-1, argmax, cold.double())

    def _penalised(self, scores: Tensor, emitted: Tensor, prompted: Tensor) -> Tensor:
        seen = (emitted > 0) | prompted[:, None]
        repeated = torch.where(scores > 0, scores / self._repetition, scores * self._repetition)
        scores = torch.where(seen, repeated, scores)
        return scores - self._presence * (emitted > 0) - self._frequency * emitted

    def _truncated(self, scores: Tensor) -> Tensor:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        last = ordered.gather(-1, (self._top_k - 1).expand(*scores.shape[:2], 1))
        ordered = ordered.masked_fill(ordered < last, -torch.inf)
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        ordered = ordered.masked_fill((before >= self._top_p) & (self._top_p < 1), -torch.inf)
        return torch.empty_like(scores).scatter_(-1, order, ordered)
