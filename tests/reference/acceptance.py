"""Acceptance rules, one row at a time in plain Python, and the distribution of what they emit, by enumeration."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Law = Sequence[float]


class Round(NamedTuple):
    """What a rule says of one row's drafts.

    Attributes:
        chances: With which probability each draft holds by itself.
        from_the_end: Whether the last draft that holds brings all before it; else those before the first that fails.
        follows: Weights of the next token after 0, 1, ... accepted drafts.
    """

    chances: list[float]
    from_the_end: bool
    follows: list[list[float]]

    def accepted(self, uniform: Sequence[float]) -> int:
        """Return how many drafts hold, with one number in [0, 1) a draft."""
        holds = [number < chance for number, chance in zip(uniform, self.chances, strict=True)]
        if self.from_the_end:
            return max((place + 1 for place, held in enumerate(holds) if held), default=0)
        return next((place for place, held in enumerate(holds) if not held), len(holds))

    def probs_of_accepted(self) -> list[float]:
        """Return the probability of 0, 1, ... accepted drafts."""
        fails = [1 - chance for chance in self.chances]
        counts = range(len(fails) + 1)
        if self.from_the_end:
            return [([1.0, *self.chances][n]) * math.prod(fails[n:]) for n in counts]
        return [math.prod(self.chances[:n]) * ([*fails, 1.0][n]) for n in counts]


def positive_part(one: Law, other: Law) -> list[float]:
    """Return what the first distribution has over the second."""
    return [max(a - b, 0.0) for a, b in zip(one, other, strict=True)]


def rejection(drafts: Sequence[int], source: Sequence[Law], target: Sequence[Law]) -> Round:
    """Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1."""
    pairs = list(zip(source, target, strict=False))
    chances = [min(1.0, p[x] / q[x]) for x, (q, p) in zip(drafts, pairs, strict=True)]
    return Round(chances, False, [*(positive_part(p, q) for q, p in pairs), list(target[len(drafts)])])


def block(drafts: Sequence[int], source: Sequence[Law], target: Sequence[Law]) -> Round:
    """Sun et al. 2024 (arXiv 2403.10444), algorithm 2."""
    weights = [1.0]
    for x, q, p in zip(drafts, source, target, strict=False):
        weights.append(min(1.0, weights[-1] * p[x] / q[x]))
    over = [positive_part([w * p for p in probs], q) for w, q, probs in zip(weights, source, target, strict=False)]
    sums = [sum(probs) for probs in over]
    chances = [s / (s + 1 - w) if s > 0 else 0.0 for s, w in zip(sums, weights, strict=False)]
    return Round([*chances[1:], *weights[len(drafts) :]] if drafts else [], True, [*over, list(target[len(drafts)])])


def typical(drafts: Sequence[int], target: Sequence[Law], epsilon: float, delta: float) -> int:
    """Return how many drafts hold. Cai et al. 2024 (arXiv 2401.10774), section 2.3.1."""
    for place, (x, p) in enumerate(zip(drafts, target, strict=False)):
        entropy = -sum(share * math.log(share) for share in p if share > 0)
        if not p[x] > min(epsilon, delta * math.exp(-entropy)):
            return place
    return len(drafts)


def among_top(drafts: Sequence[int], scores: Sequence[Law], top_k: int) -> int:
    """Return how many drafts hold. Stern et al. 2018 (arXiv 1811.03115), section 5.1."""
    for place, (x, row) in enumerate(zip(drafts, scores, strict=False)):
        if row[x] == -math.inf or x not in sorted(range(len(row)), key=lambda token: (-row[token], token != x))[:top_k]:
            return place
    return len(drafts)


def draw(weights: Law, uniform: float) -> int:
    """Invert the distribution function."""
    reached, goal = 0.0, uniform * sum(weights)
    for token, weight in enumerate(weights):
        reached += weight
        if goal < reached:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


def output_probs(
    rule: Callable[[Sequence[int], Sequence[Law], Sequence[Law]], Round],
    source: Mapping[tuple[int, ...], Law],
    target: Mapping[tuple[int, ...], Law],
    num_drafts: int,
    counted: Callable[[tuple[int, ...]], int],
) -> dict[tuple[int, ...], float]:
    """Return the distribution of the next ``num_drafts + 1`` tokens if one round is followed by plain decoding.

    Args:
        rule: How drafts are accepted.
        source: Law of the next draft after each sequence.
        target: Law of the next token after each sequence.
        num_drafts: Most drafts.
        counted: How many of these drafts are verified; it may look at them as the drafter sees them.
    """
    vocab = range(len(target[()]))
    found = dict.fromkeys(itertools.product(vocab, repeat=num_drafts + 1), 0.0)
    for drafts in itertools.product(vocab, repeat=num_drafts):
        chance = math.prod(source[drafts[:place]][x] for place, x in enumerate(drafts))
        if chance == 0:
            continue
        count = counted(drafts)
        round_ = rule(
            drafts[:count],
            [source[drafts[:place]] for place in range(count)],
            [target[drafts[:place]] for place in range(count + 1)],
        )
        for accepted, share in enumerate(round_.probs_of_accepted()):
            if share == 0:
                continue
            weights = round_.follows[accepted]
            for tail in itertools.product(vocab, repeat=num_drafts + 1 - accepted):
                text = drafts[:accepted] + tail
                follows = weights[tail[0]] / sum(weights)
                rest = math.prod(target[text[:place]][text[place]] for place in range(accepted + 1, num_drafts + 1))
                found[text] += chance * share * follows * rest
    return found
