"""What decoders return, and the contract that they share."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_modules.core.component import Component
from mtp_modules.decoders.request import DecodableModel, Numbers, Prompts, Request, make_request
from mtp_modules.decoders.results import DecodingStats, Round, by_prompt
from mtp_modules.decoders.sampling.parameters import GREEDY, SamplingParams
from mtp_modules.decoders.sampling.stopping import StopRule


@dataclass(frozen=True)
class Generation:
    """New tokens for every prompt.

    Attributes:
        tokens: New tokens of each prompt, without the prompt, with the tokens that stopped it.
        finish_reasons: ``"stop"`` (its stop rule), ``"length"`` (the budget) or ``"context"`` (no positions left).
        stats: Counts and time.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    stats: DecodingStats


class Decoder(Component, ABC):
    """Continues prompts. Never changes the model."""

    default_sampling: SamplingParams = GREEDY

    @abstractmethod
    def rounds(self, model: DecodableModel, request: Request) -> Iterator[Round]:
        """Yield the rounds of a request, after all checks.

        Args:
            model: Trunk, heads and unembedding.
            request: Checked.

        Raises:
            ValueError: If the decoder needs what the model cannot do.
        """

    def stream(
        self,
        model: DecodableModel,
        prompts: Prompts,
        *,
        max_new_tokens: Numbers,
        stop: StopRule | Sequence[StopRule] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: Numbers = 0,
    ) -> Iterator[Round]:
        """Yield new tokens as forward passes emit them; stop iterating to cancel.

        A row's output depends on its own prompt, sampling parameters, seed and stop rule, never on its neighbours.

        Args:
            model: Trunk, heads and unembedding, in evaluation mode.
            prompts: Token ids, of any lengths: lists, tensors, arrays, or what a tokenizer returns.
            max_new_tokens: Budget of every prompt, or of each.
            stop: When a row ends before its budget, for all or for each; never if ``None``.
            sampling: How tokens are sampled, for all or for each; the argmax if ``None``.
            seed: Seed of the first row, the next ones count on; or of each.

        Raises:
            ValueError: If the model is in training mode; if a prompt is empty, too long, or holds a token outside the
                vocabulary; if a list has not one item a prompt; if the model's logits give no distribution.
        """
        return self.rounds(model, self._request(model, prompts, max_new_tokens, stop, sampling, seed))

    def generate(
        self,
        model: DecodableModel,
        prompts: Prompts,
        *,
        max_new_tokens: Numbers,
        stop: StopRule | Sequence[StopRule] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: Numbers = 0,
    ) -> Generation:
        """Decode to the end; see :meth:`stream` for the arguments."""
        started = time.perf_counter()
        generation = self._collect(model, self._request(model, prompts, max_new_tokens, stop, sampling, seed))
        generation.stats.seconds = time.perf_counter() - started
        return generation

    def _request(
        self, model: DecodableModel, prompts: Prompts, max_new_tokens: Any, stop: Any, sampling: Any, seed: Any
    ) -> Request:
        sampling = self.default_sampling if sampling is None else sampling
        return make_request(model, prompts, max_new_tokens, stop, sampling, seed)

    def _collect(self, model: DecodableModel, request: Request) -> Generation:
        """Decode to the end, without a clock."""
        rounds, stats = [done.arrays for done in self.rounds(model, request)], DecodingStats()
        stats.count_arrays(rounds)
        tokens, reasons = by_prompt(rounds, len(request.prompts))
        return Generation(tokens, reasons, stats)
