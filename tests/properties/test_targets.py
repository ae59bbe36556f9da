"""Laws of the offset arithmetic."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.core import future_targets, targets
from tests import reference
from tests.reference import targets as naive


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], torch.Tensor | None, torch.Tensor | None]:
    """Draw tokens, horizons (leaps too), documents whose ids come back, and a mask."""
    horizons = tuple(sorted(draw(st.sets(st.integers(1, 7), min_size=1, max_size=4))))
    rows, length = draw(st.integers(1, 3)), max(horizons) + draw(st.integers(1, 6))

    def table(values: st.SearchStrategy) -> torch.Tensor:
        row = st.lists(values, min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))

    documents = table(st.integers(0, 1)) if draw(st.booleans()) else None
    mask = table(st.booleans()) if draw(st.booleans()) else None
    return table(st.sampled_from([-100, *range(9)])), horizons, documents, mask


@given(batches())
def test_future_targets_equal_the_triple_loop(batch: tuple) -> None:
    actual, expected = future_targets(*batch), naive.future_targets(*batch)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_an_id_that_comes_back_is_another_document() -> None:
    tokens = torch.arange(5)[None]
    _, valid = future_targets(tokens, (2,), torch.tensor([[7, 8, 7, 7, 7]]))
    assert valid.flatten().tolist() == [False, False, True]


@given(st.integers(1, 4), st.integers(1, 5))
def test_a_draft_comes_from_the_latest_position_that_speaks_of_it(num_horizons: int, stride: int) -> None:
    horizons = targets.leaping_horizons(num_horizons, stride)
    assert horizons == tuple(1 + stride * index for index in range(num_horizons))
    for depth in range(horizons[-1] - 1):
        speak = [(back, index) for back in range(30) for index, h in enumerate(horizons) if h - back == depth + 2]
        assert targets.horizon_of_draft(horizons, depth)[::-1] == min(speak)
        assert min(speak)[0] < stride
    assert targets.horizon_of_draft(horizons, horizons[-1] - 1) == (num_horizons - 1, 0)


@given(batches())
def test_tokens_between_are_those_after_the_position(batch: tuple) -> None:
    tokens, horizons, _, _ = batch
    between = targets.tokens_between(tokens, horizons)
    for b, t, k in torch.cartesian_prod(*(torch.arange(size) for size in (*between.shape, 1)))[:, :3].tolist():
        assert between[b, t, k] == tokens[b, t + 1 + k]
    assert between.shape[2] == max(horizons) - 1


def test_tokens_between_at_positions() -> None:
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]])
    between = targets.tokens_between(tokens, (1, 2, 3), torch.tensor([[0, 2], [1, 2]]))
    assert between.tolist() == [[[1, 2], [3, 4]], [[12, 13], [13, 14]]]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_document_runs_count_the_changes(ids: list[int]) -> None:
    expected = [sum(ids[s] != ids[s - 1] for s in range(1, t + 1)) for t in range(len(ids))]
    assert targets.document_runs(torch.tensor([ids]))[0].tolist() == expected


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_same_document_keys_equal_the_double_loop(ids: list[int]) -> None:
    documents = torch.tensor([ids])
    seen = targets.same_document_keys(documents)[0]
    for query in range(len(ids)):
        for key in range(len(ids)):
            allowed = key <= query and reference.targets.same_document(documents, 0, key, query)
            assert seen[query, key] == allowed


@pytest.mark.parametrize(("length", "share", "count"), [(8, 0.25, 2), (8, 1.0, 8), (5, 0.01, 1)])
def test_sampled_positions_are_sorted_and_distinct(length: int, share: float, count: int) -> None:
    positions = targets.sample_positions(50, length, share, torch.device("cpu"))
    assert positions.shape == (50, count)
    assert (positions.diff(dim=1) > 0).all()
    assert positions.min() >= 0
    assert positions.max() < length


def test_every_subset_of_positions_is_equally_likely() -> None:
    rows = 12_000
    subsets = Counter(map(tuple, targets.sample_positions(rows, 4, 0.5, torch.device("cpu")).tolist()))
    assert len(subsets) == 6
    statistic = sum((seen - rows / 6) ** 2 / (rows / 6) for seen in subsets.values())
    assert statistic < 35.9  # chi-square with 5 degrees of freedom, alpha 1e-6
