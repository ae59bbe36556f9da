"""Random numbers that depend on a row's seed and a place in its text, and on nothing else.

A generator's next number depends on how many were drawn before, so on the neighbours in the batch, on how many tokens
were drafted, on the order of everything. Here a number is a function of (seed, position, stream, index): a hash with
the finaliser of SplitMix64 (Steele et al. 2014).
"""

import torch

from mtp_modules.core.shapes import Float, Int, Tensor

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed number
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685
_STREAM = 2862933555777941757


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
        positions: Places in the row's text.
        stream: Another stream is another, independent set of numbers.
        width: How many numbers a place has.
    """
    row = _mixed(seeds * _GOLDEN + _STREAM * (stream + 1))
    place = _mixed(row[:, None] + positions * _GOLDEN)
    index = torch.arange(1, width + 1, device=seeds.device)
    bits = _shifted(_mixed(place[:, :, None] + index * _GOLDEN), 11)
    return bits.double() * 2.0**-53


def gumbels(
    seeds: Int[Tensor, " B"], positions: Int[Tensor, "B C"], *, stream: int, width: int
) -> Float[Tensor, "B C W"]:
    """Return numbers from the standard Gumbel law, float64; see :func:`uniforms`.

    Adding them to log-probabilities and taking the largest draws from the law (Gumbel 1954).

    Args:
        seeds: One a row.
        positions: Places in the row's text.
        stream: Another stream is another, independent set of numbers.
        width: How many numbers a place has.
    """
    return -(-(uniforms(seeds, positions, stream=stream, width=width) + 2.0**-54).log()).log()


def draw(law: Float[Tensor, "*N V"], uniform: Float[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """Draw from laws by inverting their distribution function. A token of probability 0 is never drawn.

    Args:
        law: Weights, not necessarily normalised, not all 0.
        uniform: One number in [0, 1) a law.
    """
    reached = law.cumsum(dim=-1)
    total = reached[..., -1:]
    index = torch.searchsorted(reached, uniform[..., None] * total, right=True)[..., 0]
    last = law.shape[-1] - 1 - (law > 0).flip(-1).to(torch.int8).argmax(dim=-1)
    return torch.minimum(index, last)
