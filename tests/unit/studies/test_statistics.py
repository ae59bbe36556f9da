"""Intervals against the printed table of Student's t, and against the integral that defines it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.studies import estimate
from mtp_modules.studies.statistics import student_quantile, student_within

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize(("freedom", "expected"), TABLE.items())
def test_the_quantile_is_that_of_the_table(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-4)


@given(st.integers(1, 40), st.floats(0.0, 8.0))
def test_the_probability_is_the_integral_of_the_density(freedom: int, t: float) -> None:
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    parts, total = 2000, 0.0
    for index in range(parts):  # midpoints
        x = (index + 0.5) * t / parts
        total += scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) * t / parts
    assert student_within(t, freedom) == pytest.approx(2 * total, abs=1e-6)


@given(st.floats(0.51, 0.999), st.integers(1, 60))
def test_the_quantile_is_where_the_probability_is_reached(probability: float, freedom: int) -> None:
    assert student_within(student_quantile(probability, freedom), freedom) == pytest.approx(2 * probability - 1)


def test_an_interval_by_hand() -> None:
    found = estimate([10.0, 12.0, 14.0, 16.0])  # standard deviation sqrt(20/3), over sqrt(4), times 3.182
    assert found.mean == 13.0
    assert found.half == pytest.approx(3.1824 * math.sqrt(20 / 3) / 2, rel=1e-4)
    assert (found.low, found.high) == (13.0 - found.half, 13.0 + found.half)


def test_one_value_has_no_interval() -> None:
    found = estimate([3.0])
    assert (found.mean, found.half, found.low, found.high, found.n) == (3.0, None, 3.0, 3.0, 1)


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="number of values must be at least 1, got 0"):
        estimate([])
