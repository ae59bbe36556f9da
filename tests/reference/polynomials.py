"""Polynomial arithmetic as it is written down: whole products over the integers, then what is left in the ring."""

from collections.abc import Sequence

import numpy as np


def reduced(f: np.ndarray, size: int, modulus: int) -> tuple[int, ...]:
    """Drop the powers from ``size`` on, and take coefficients modulo ``modulus``."""
    padded = np.zeros(size, dtype=object)
    padded[: min(size, len(f))] = f[:size]
    return tuple(int(a) % modulus for a in padded)


def substituted(f: Sequence[int], g: Sequence[int]) -> np.ndarray:
    """Return f(g) over the integers, as the sum of a_i g^i with every power whole."""
    total = np.zeros(1, dtype=object)
    power = np.ones(1, dtype=object)
    for a in f:
        total = np.polynomial.polynomial.polyadd(total, a * power)
        power = np.polynomial.polynomial.polymul(power, np.array(g, dtype=object))
    return total


def worked_out(text: str, size: int, modulus: int) -> tuple[int, ...]:
    """Work out the expression before ``=``, reading it from its end with a stack."""
    words = text.split("=")[0].split()
    stack: list[tuple[int, ...]] = []
    coefficients: list[int] = []
    for word in reversed(words):
        if word.isdigit():
            coefficients.insert(0, int(word))
            if len(coefficients) == size:
                stack.append(tuple(coefficients))
                coefficients = []
            continue
        assert not coefficients
        f = stack.pop()
        if word == "-":
            stack.append(reduced(-np.array(f, dtype=object), size, modulus))
            continue
        g = stack.pop()
        whole = {
            "+": lambda f=f, g=g: np.array(f, dtype=object) + np.array(g, dtype=object),
            "*": lambda f=f, g=g: np.polynomial.polynomial.polymul(
                np.array(f, dtype=object), np.array(g, dtype=object)
            ),
            "@": lambda f=f, g=g: substituted(f, g),
        }[word]()
        stack.append(reduced(whole, size, modulus))
    (value,) = stack
    return value
