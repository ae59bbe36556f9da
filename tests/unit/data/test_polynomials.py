"""Polynomial arithmetic against its naive twin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.data import PolynomialTask
from mtp_modules.data.polynomials import OPERATORS, add, compose, multiply, negate
from tests.reference.polynomials import reduced, substituted, worked_out

coefficients = st.lists(st.integers(0, 6), min_size=5, max_size=5).map(tuple)


@given(coefficients, coefficients)
def test_operations_equal_those_over_the_integers(f: tuple[int, ...], g: tuple[int, ...]) -> None:
    whole = {
        add: np.array(f) + np.array(g),
        multiply: np.polynomial.polynomial.polymul(np.array(f, dtype=object), np.array(g, dtype=object)),
        compose: substituted(f, g),
    }
    for operation, expected in whole.items():
        assert operation(f, g, 7) == reduced(expected, 5, 7)
    assert add(f, negate(f, 7), 7) == (0,) * 5


@given(coefficients, coefficients, coefficients)
def test_the_distributions_of_a_ring(f: tuple[int, ...], g: tuple[int, ...], h: tuple[int, ...]) -> None:
    assert multiply(f, multiply(g, h, 7), 7) == multiply(multiply(f, g, 7), h, 7)
    assert multiply(f, add(g, h, 7), 7) == add(multiply(f, g, 7), multiply(f, h, 7), 7)
    assert compose(add(f, g, 7), h, 7) == add(compose(f, h, 7), compose(g, h, 7), 7)
    assert multiply(f, (1, 0, 0, 0, 0), 7) == compose(f, (0, 1, 0, 0, 0), 7) == f


@given(
    operations=st.integers(1, 8), seed=st.integers(0, 10**6), modulus=st.sampled_from([2, 3, 7]), size=st.integers(1, 6)
)
def test_an_answer_follows_from_its_expression(operations: int, seed: int, modulus: int, size: int) -> None:
    task = PolynomialTask(
        min_operations=operations,
        max_operations=operations,
        modulus=modulus,
        num_coefficients=size,
        num_pauses=seed % 3,
    )
    example = task.sample(np.random.default_rng(seed), "train")
    answer = tuple(token for token, asked in zip(*example, strict=True) if asked)
    text = task.tokenizer.decode(example.tokens)
    assert answer == worked_out(text, size, modulus) == task.evaluate(example.tokens)
    assert sum(text.split().count(operator) for operator in OPERATORS) == operations
    assert example.tokens.count(task.blank) == seed % 3
    assert len(example.tokens) <= task.longest


def test_operations_are_sampled_evenly() -> None:
    task = PolynomialTask()
    generator = np.random.default_rng(0)
    texts = [task.tokenizer.decode(task.sample(generator, "train").tokens).split() for _ in range(2000)]
    counts = np.array([[text.count(operator) for operator in OPERATORS] for text in texts])
    assert np.bincount(counts.sum(axis=1), minlength=6)[1:] / 2000 - 0.2 == pytest.approx(0, abs=0.04)
    assert counts.sum(axis=0) / counts.sum() == pytest.approx([0.25] * 4, abs=0.04)
    longest = max(len(text) for text in texts)
    assert longest == task.longest, "an expression without a negation is as long as it gets"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_operations": 0}, "min_operations must be at least 1, got 0"),
        ({"min_operations": 4, "max_operations": 3}, "max_operations must be at least 4, got 3"),
        ({"modulus": 6}, "modulus must be a prime, got 6; 7 is the paper's"),
        ({"modulus": 1}, "modulus must be a prime, got 1"),
        ({"num_coefficients": 0}, "num_coefficients must be at least 1, got 0"),
        ({"num_pauses": -1}, "num_pauses must be at least 0, got -1"),
    ],
)
def test_senseless_arguments_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolynomialTask(**kwargs)


@pytest.mark.parametrize("text", ["", "+", "+ 1 2 3 4 5 =", "1 2 3", "- - =", "* 1 2 3 4 5 1 2 3 4 ="])
def test_an_expression_that_breaks_off_is_refused(text: str) -> None:
    task = PolynomialTask()
    with pytest.raises(ValueError, match="breaks off at token"):
        task.evaluate(task.tokenizer.encode(text))
