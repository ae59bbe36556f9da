"""Arithmetic with truncated polynomials: an algorithmic task of Gloeckle et al. 2024 (arXiv 2404.19737)."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.data.tasks import Example, Task
from mtp_modules.data.tokenizers import WordTokenizer

Polynomial: TypeAlias = tuple[int, ...]
"""Coefficients, the constant one first."""

OPERATORS = ("-", "+", "*", "@")
"""Negation, addition, multiplication, composition (``@ f g`` is f of g)."""


def negate(f: Polynomial, modulus: int) -> Polynomial:
    """Return ``-f``.

    Args:
        f: Coefficients.
        modulus: Of the coefficients.
    """
    return tuple(-a % modulus for a in f)


def add(f: Polynomial, g: Polynomial, modulus: int) -> Polynomial:
    """Return ``f + g``.

    Args:
        f: Coefficients.
        g: As many.
        modulus: Of the coefficients.
    """
    return tuple((a + b) % modulus for a, b in zip(f, g, strict=True))


def multiply(f: Polynomial, g: Polynomial, modulus: int) -> Polynomial:
    """Return ``f g`` without the powers beyond the truncation.

    Args:
        f: Coefficients.
        g: As many.
        modulus: Of the coefficients.
    """
    return tuple(sum(f[i] * g[power - i] for i in range(power + 1)) % modulus for power in range(len(f)))


def compose(f: Polynomial, g: Polynomial, modulus: int) -> Polynomial:
    """Return ``f(g)`` by Horner's rule, without the powers beyond the truncation.

    ``f`` stands for the polynomial with exactly these coefficients. (In the ring alone ``f(g)`` is not defined where
    ``g`` has a constant coefficient.)

    Args:
        f: Coefficients.
        g: As many.
        modulus: Of the coefficients.
    """
    result = (0,) * len(f)
    for a in reversed(f):
        constant, *others = multiply(result, g, modulus)
        result = ((constant + a) % modulus, *others)
    return result


class PolynomialTask(Task):
    """Evaluate an expression in the ring of polynomials over a finite field modulo a power of X.

    ``= * - f g`` asks for the product of ``-f`` and ``g``: prefix notation, so there are no brackets. Every polynomial
    is written as its coefficients, the constant one first, and so is the answer. Operators and coefficients are sampled
    uniformly; the number of operations to the left of a binary operator is uniform over the possible ones. Gloeckle et
    al. 2024 (arXiv 2404.19737), section 4.2; the notation is our own.

    The paper trains on 1 to 5 operations, with uniform probability, and tests on more of them.

    Args:
        min_operations: Fewest operations of an expression.
        max_operations: Most operations of an expression.
        modulus: A prime, of the coefficients.
        num_coefficients: Power of X that is 0.
        num_pauses: Pause tokens between question and answer. Goyal et al. 2023 (arXiv 2310.02226).

    Raises:
        ValueError: If a number is too small, or ``modulus`` is no prime.

    Example:
        >>> task = PolynomialTask()
        >>> question, answer = "+ 1 2 3 4 5 0 0 0 6 6 =", "1 2 3 3 4"
        >>> len(task.tokenizer.encode(question)), task.evaluate(task.tokenizer.encode(question))
        (12, (1, 2, 3, 3, 4))
    """

    def __init__(
        self,
        *,
        min_operations: int = 1,
        max_operations: int = 5,
        modulus: int = 7,
        num_coefficients: int = 5,
        num_pauses: int = 0,
    ) -> None:
        at_least(self, "min_operations", min_operations, 1)
        at_least(self, "max_operations", max_operations, min_operations)
        at_least(self, "num_coefficients", num_coefficients, 1)
        at_least(self, "num_pauses", num_pauses, 0)
        if modulus < 2 or any(modulus % divisor == 0 for divisor in range(2, modulus)):
            refuse(self, f"modulus must be a prime, got {modulus}; 7 is the paper's.")
        self.min_operations, self.max_operations, self.modulus = min_operations, max_operations, modulus
        self.num_coefficients, self.num_pauses = num_coefficients, num_pauses
        self.tokenizer = WordTokenizer(words=[*map(str, range(modulus)), *OPERATORS, "=", "_"])
        self.equals, self.blank = modulus + len(OPERATORS), modulus + len(OPERATORS) + 1

    @property
    def longest(self) -> int:
        """Tokens of the longest expression without a negation, and of its answer."""
        return self.max_operations + (self.max_operations + 2) * self.num_coefficients + 1 + self.num_pauses

    def sample(self, generator: np.random.Generator, split: str) -> Example:
        """Sample an expression and evaluate it."""
        operations = int(generator.integers(self.min_operations, self.max_operations + 1))
        question, value = self._expression(generator, operations)
        prompt = [*question, self.equals, *[self.blank] * self.num_pauses]
        return Example([*prompt, *value], [False] * len(prompt) + [True] * len(value))

    def _expression(self, generator: np.random.Generator, operations: int) -> tuple[list[int], Polynomial]:
        if operations == 0:
            value = tuple(generator.integers(self.modulus, size=self.num_coefficients).tolist())
            return list(value), value
        operator = int(generator.integers(len(OPERATORS)))
        left_operations = operations - 1 if OPERATORS[operator] == "-" else int(generator.integers(operations))
        tokens, value = self._expression(generator, left_operations)
        if OPERATORS[operator] == "-":
            return [self.modulus + operator, *tokens], negate(value, self.modulus)
        right, other = self._expression(generator, operations - 1 - left_operations)
        apply = {"+": add, "*": multiply, "@": compose}[OPERATORS[operator]]
        return [self.modulus + operator, *tokens, *right], apply(value, other, self.modulus)

    def evaluate(self, tokens: Sequence[int]) -> Polynomial:
        """Return the value of an expression; tokens after it are ignored.

        Args:
            tokens: Of a whole expression, or of a row.

        Raises:
            ValueError: If the expression ends too early.
        """
        value, _ = self._read(tokens, 0)
        return value

    def _read(self, tokens: Sequence[int], place: int) -> tuple[Polynomial, int]:
        """Return the value of the expression that starts at a place, and where it ends."""
        token = tokens[place] if place < len(tokens) else self.equals
        if token < self.modulus:
            end = place + self.num_coefficients
            value = tuple(tokens[place:end])
            if len(value) == self.num_coefficients and max(value) < self.modulus:
                return value, end
        elif token < self.equals:
            operator = OPERATORS[token - self.modulus]
            value, end = self._read(tokens, place + 1)
            if operator == "-":
                return negate(value, self.modulus), end
            other, end = self._read(tokens, end)
            return {"+": add, "*": multiply, "@": compose}[operator](value, other, self.modulus), end
        refuse(self, f"the expression {self.tokenizer.decode(list(tokens))!r} breaks off at token {place}.")
