"""The position x horizon table against a loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.metrics import PerHeadMetrics, PositionAccuracy
from tests.unit.metrics.test_answers import terms


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_the_table_is_that_of_a_loop(seed: int, rows: int, length: int, horizons: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randint(2, (rows, length, horizons), generator=generator)
    valid = torch.rand((rows, length, horizons), generator=generator) < 0.7
    metric = PositionAccuracy(num_positions=length, num_horizons=horizons)
    for row in range(rows):  # adding up over batches
        metric.update(terms(rank[row : row + 1], valid[row : row + 1]))
    table = metric.compute()
    for t in range(length):
        for h in range(horizons):
            counted = [row for row in range(rows) if valid[row, t, h]]
            right = sum(1 for row in counted if rank[row, t, h] == 0)
            expected = right / len(counted) if counted else math.nan
            assert table[t][h] == pytest.approx(expected, nan_ok=True)


def test_it_averages_to_the_accuracy_of_the_heads() -> None:
    batch = terms(torch.randint(2, (5, 7, 3)), torch.ones(5, 7, 3).bool())
    heads, table = PerHeadMetrics(num_horizons=3), PositionAccuracy(num_positions=7, num_horizons=3)
    heads.update(batch)
    table.update(batch)
    figures, mean = heads.compute(), torch.tensor(table.compute()).mean(dim=0)
    for h in range(3):
        assert float(mean[h]) == pytest.approx(float(figures[f"accuracy/head_{h + 1}"]))


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PositionAccuracy: was built for \(T, H\) = \(4, 2\), got \(3, 2\)"):
        PositionAccuracy(num_positions=4, num_horizons=2).update(
            terms(torch.zeros(1, 3, 2).long(), torch.ones(1, 3, 2).bool())
        )
