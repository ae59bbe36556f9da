"""Laws of sampling, one token at a time in plain Python."""

import math
from collections.abc import Sequence

from mtp_modules.decoders import SamplingParams


def probs(
    logits: Sequence[float], settings: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Return the probabilities that the next token is sampled with."""
    scores = dict(enumerate(logits))
    for token in scores:
        if token in prompt or token in output:
            factor = settings.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        if token in output:
            scores[token] -= settings.presence_penalty + settings.frequency_penalty * output.count(token)
    if settings.allowed_tokens is not None:
        scores = {token: score for token, score in scores.items() if token in settings.allowed_tokens}
    if settings.temperature == 0:
        best = max(scores, key=lambda token: (scores[token], -token))
        return [float(token == best) for token in range(len(logits))]
    scores = {token: score / settings.temperature for token, score in scores.items()}
    if settings.top_k is not None:
        last = sorted(scores.values(), reverse=True)[: settings.top_k][-1]
        scores = {token: score for token, score in scores.items() if score >= last}
    if settings.top_p < 1:
        kept, reached = {}, 0.0
        total = sum(math.exp(score) for score in scores.values())
        for token, score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
            if reached < settings.top_p:
                kept[token] = score
            reached += math.exp(score) / total
        scores = kept
    most = max(scores.values())
    scores = {token: score for token, score in scores.items() if math.exp(score - most) >= settings.min_p}
    total = sum(math.exp(score) for score in scores.values())
    return [math.exp(scores[token]) / total if token in scores else 0.0 for token in range(len(logits))]


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom, cells with fewer than 5 expected counts pooled."""
    total = sum(counts)
    statistic, cells, pooled_count, pooled = 0.0, 0, 0, 0.0
    for count, probability in zip(counts, probabilities, strict=True):
        if probability == 0:
            assert count == 0, "an outcome of probability 0 came out"
        elif total * probability < 5:
            pooled_count, pooled = pooled_count + count, pooled + total * probability
        else:
            statistic += (count - total * probability) ** 2 / (total * probability)
            cells += 1
    if pooled >= 5:
        statistic += (pooled_count - pooled) ** 2 / pooled
        cells += 1
    return statistic, cells - 1


def limit(degrees: int, deviations: float = 4.9) -> float:
    """Return the chi-square quantile that is passed once in two million times (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + deviations * spread**0.5) ** 3
