"""Random numbers that depend on a row's seed and a position of its text, and on nothing else.

A generator's next number depends on how many came before, so on the neighbours in the batch, on how many tokens
were drafted, on the order of everything. Here a number is a function of (seed, position, stream, index): a hash with
the finaliser of SplitMix64 (Steele et al. 2014).
"""

from collections.abc import Callable

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Int, Tensor

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed number
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685
_STREAM = 2862933555777941757
_IN_CACHE = 1 << 16
"""Numbers of 8 bytes that stay in a CPU's cache."""


def _mixed(x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """Scramble 64 bits; products wrap around."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*N"], bits: int) -> Int[Tensor, "*N"]:
    """Shift to the right without copies of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(
    seeds: Int[Tensor, " B"], positions: Int[Tensor, "B C"], *, stream: int, width: int
) -> Float[Tensor, "B C W"]:
    """Return numbers in [0, 1), float64.

    Args:
        seeds: One a row.
        positions: Of the row's text.
        stream: Another stream is another, independent set of numbers.
        width: How many numbers a position has.
    """
    row = _mixed(seeds * _GOLDEN + _STREAM * (stream + 1))
    place = _mixed(row[:, None] + positions * _GOLDEN)
    index = torch.arange(1, width + 1, device=seeds.device)
    bits = _shifted(_mixed(place[:, :, None] + index * _GOLDEN), 11)
    return bits.double() * 2.0**-53


def gumbels(
    seeds: Int[Tensor, " B"], positions: Int[Tensor, "B C"], *, stream: int, width: int
) -> Float[Tensor, "B C W"]:
    """Return numbers from the standard Gumbel distribution, float64; see :func:`uniforms`.

    The argmax of log-probabilities plus such numbers is a sample (the Gumbel-max trick; Gumbel 1954).
    """
    if seeds.device.type == "cpu" and not torch.compiler.is_compiling():
        return _gumbels_in_cache(seeds, positions, stream=stream, width=width)
    return -(-(uniforms(seeds, positions, stream=stream, width=width) + 2.0**-54).log()).log()


def _gumbels_in_cache(
    seeds: Int[Tensor, " B"], positions: Int[Tensor, "B C"], *, stream: int, width: int
) -> Float[Tensor, "B C W"]:
    """Return the same numbers, some positions at a time and in place, within a CPU's cache: four times as fast."""
    places = _mixed(_mixed(seeds * _GOLDEN + _STREAM * (stream + 1))[:, None] + positions * _GOLDEN)
    index = torch.arange(1, width + 1) * _GOLDEN
    numbers = torch.empty(*places.shape, width, dtype=torch.float64)
    every, rows = places.flatten(), max(1, _IN_CACHE // max(1, width))
    for start in range(0, len(every), rows):
        bits, own = every[start : start + rows, None] + index, numbers.flatten(0, 1)[start : start + rows]
        for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
            bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
        own.copy_(bits.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1))
        own.mul_(2.0**-53).add_(2.0**-54).log_().neg_().log_().neg_()
    return numbers


def sample(probs: Float[Tensor, "*N V"], uniform: Float[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """Sample by inverting the cumulative distribution function. A token of probability 0 is never sampled.

    Args:
        probs: Weights, not necessarily normalised, not all 0.
        uniform: One number in [0, 1) a distribution.
    """
    reached = probs.cumsum(dim=-1)
    total = reached[..., -1:]
    index = torch.searchsorted(reached, uniform[..., None] * total, right=True)[..., 0]
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).to(torch.int8).argmax(dim=-1)
    return torch.minimum(index, last)


_OWN, _APART = 0, 1


class RowNoise:
    """The random numbers of one round: functions of each row's seed and of how many tokens its text has.

    They are made once, when they are first asked for.

    Args:
        seeds: ``(B,)``.
        positions: ``(B,)``, how many tokens each row has, prompt included: the position of the next one.
        vocab_size: Number ``V`` of token ids.
        most: Most tokens ``C`` that a row can emit in the round.
        make_gumbels: What makes Gumbel numbers; a compiled :func:`gumbels`, for instance.
    """

    def __init__(
        self,
        seeds: Int[Tensor, " B"],
        positions: Int[Tensor, " B"],
        vocab_size: int,
        most: int,
        make_gumbels: Callable[..., Tensor] = gumbels,
    ) -> None:
        self.seeds, self.positions, self.vocab_size, self.most = seeds, positions, vocab_size, most
        self._make_gumbels = make_gumbels
        self._gumbels: Float[Tensor, "B C V"] | None = None
        self._uniforms: Float[Tensor, "B _"] | None = None

    @staticmethod
    def _made_before(numbers: Tensor | None) -> None:
        """Refuse to make numbers in a compiled round, whose compiler options are for other things."""
        if numbers is None and torch.compiler.is_compiling():
            refuse("RowNoise", "numbers are asked for in a compiled round; let Acceptance.prepare ask for them before.")

    def gumbels(self) -> Float[Tensor, "B C V"]:
        """Return the Gumbel numbers of the next positions, which drafts and the model's own tokens are sampled with."""
        self._made_before(self._gumbels)
        if self._gumbels is None:
            positions = self.positions[:, None] + torch.arange(self.most, device=self.positions.device)
            self._gumbels = self._make_gumbels(self.seeds, positions, stream=_OWN, width=self.vocab_size)
        return self._gumbels

    def uniforms(self) -> Float[Tensor, "B _"]:
        """Return the uniform numbers of this round: by turns one for a draft, and one for its verification."""
        self._made_before(self._uniforms)
        if self._uniforms is None:
            self._uniforms = uniforms(self.seeds, self.positions[:, None], stream=_APART, width=2 * self.most)[:, 0]
        return self._uniforms

    def for_draft(self, depth: int) -> Float[Tensor, " B"]:
        """Return the number that a draft is sampled with."""
        return self.uniforms()[:, 2 * depth]

    def for_verification(self, width: int) -> Float[Tensor, "B W"]:
        """Return the numbers that a verification needs."""
        return self.uniforms()[:, 1 : 2 * width : 2]

    def sample(self, probs: Float[Tensor, "B C V"], depth: int = 0) -> Int[Tensor, "B C"]:
        """Sample with the numbers that belong to the positions of the text, as plain decoding does."""
        return (probs.log() + self.gumbels()[:, depth : depth + probs.shape[1]]).argmax(dim=-1)
