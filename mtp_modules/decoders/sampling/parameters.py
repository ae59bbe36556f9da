"""The distribution that tokens are sampled from: the model's own, sharpened, truncated and penalised as users ask."""

import math
import sys
from collections.abc import Sequence, Sized
from typing import SupportsFloat

from mtp_modules.core.checks import at_least, fraction, refuse, whole
from mtp_modules.core.component import Component


class SamplingParams(Component):
    """How a row turns logits into the distribution that its tokens are sampled from.

    In this order: penalties, allowed tokens, temperature, top-k, top-p, min-p, each on what the one before has left.
    Drafts go through the same parameters, position by position, with the same history.

    Args:
        temperature: Logits are divided by it; 0, or what is too small to divide by, takes the argmax.
        top_k: Keep the ``k`` most likely tokens, and those that tie with the last of them; all if ``None``.
        top_p: Keep the fewest tokens, most likely first, whose probabilities reach this sum (Holtzman et al. 2020,
            arXiv 1904.09751).
        min_p: Keep tokens at least this share as likely as the most likely one (Nguyen et al. 2024, arXiv 2407.01082).
        repetition_penalty: Divide positive logits, and multiply negative ones, of every token in the prompt or output
            by it (Keskar et al. 2019, arXiv 1909.05858).
        presence_penalty: Subtract it from the logit of every token of the output.
        frequency_penalty: Subtract it once for every time that the token is in the output.
        allowed_tokens: Only these can be sampled; all if ``None``.

    Raises:
        ValueError: If a number lies outside its range or is not finite, or no token is allowed.
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
        for name, value in (
            ("temperature", temperature),
            ("top_p", top_p),
            ("min_p", min_p),
            ("repetition_penalty", repetition_penalty),
            ("presence_penalty", presence_penalty),
            ("frequency_penalty", frequency_penalty),
        ):
            if not isinstance(value, SupportsFloat):
                refuse(self, f"{name} must be a number, got {value!r}.")
        at_least(self, "temperature", temperature, 0)
        top_k = None if top_k is None else whole(self, "top_k", top_k, 1)
        fraction(self, "top_p", top_p, zero=False)
        fraction(self, "min_p", min_p)
        if not repetition_penalty > 0:
            refuse(self, f"repetition_penalty must be above 0, got {repetition_penalty}.")
        for name, value in (
            ("temperature", temperature),
            ("repetition_penalty", repetition_penalty),
            ("presence_penalty", presence_penalty),
            ("frequency_penalty", frequency_penalty),
        ):
            if not math.isfinite(value):
                refuse(self, f"{name} must be a finite number, got {value}.")
        if allowed_tokens is not None and not isinstance(allowed_tokens, Sized):
            refuse(self, f"allowed_tokens must be a list of token ids, got {allowed_tokens!r}.")
        if allowed_tokens is not None and len(allowed_tokens) == 0:
            refuse(self, "allowed_tokens is empty; allow at least one token, or give null to allow all.")
        self.temperature = temperature if temperature >= sys.float_info.min else 0.0
        self.top_k, self.top_p, self.min_p = top_k, top_p, min_p
        self.repetition_penalty = repetition_penalty
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self.allowed_tokens = None
        if allowed_tokens is not None:
            self.allowed_tokens = sorted({whole(self, "allowed_tokens", token, 0) for token in allowed_tokens})

    @property
    def greedy(self) -> bool:
        """Whether the argmax of the model's own logits is all that can be sampled."""
        return self.temperature == 0 and not self.penalises and self.allowed_tokens is None

    @property
    def penalises(self) -> bool:
        """Whether the distribution depends on what the row has read."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


GREEDY = SamplingParams(temperature=0.0)
