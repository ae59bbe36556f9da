"""The training order is a pure function of the seed, whoever reads it and however often it is interrupted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.data.loaders import EvalLoader, TrainLoader
from mtp_modules.data.rows import EpochOrder, IntArray, TokenRows, evenly_spread


class Numbers(TokenRows):
    """Rows that are their own ids."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def epoch_ids(self, generator: np.random.Generator) -> IntArray:
        return generator.permutation(self.num_rows)

    def fixed_ids(self) -> IntArray:
        return np.arange(self.num_rows)

    def batch(self, ids: IntArray) -> dict[str, torch.Tensor]:
        return {"tokens": torch.from_numpy(ids)}

    def digest(self) -> str:
        return str(self.num_rows)


def loader(num_rows: int = 10, batch_size: int = 3, seed: int = 0, **kwargs: int) -> TrainLoader:
    return TrainLoader(order=EpochOrder(rows=Numbers(num_rows), seed=seed), batch_size=batch_size, **kwargs)


def read(train: TrainLoader, count: int) -> list[list[int]]:
    """Return the next batches, leaving an iteration in the middle as an interrupted run does."""
    batches: list[list[int]] = []
    while len(batches) < count:
        for batch in train:
            batches.append(batch["tokens"].tolist())
            if len(batches) == count:
                break
    return batches


@given(st.integers(3, 20), st.integers(1, 3), st.integers(0, 25), st.integers(0, 25))
def test_resume_neither_replays_nor_skips(num_rows: int, batch_size: int, before: int, after: int) -> None:
    whole = read(loader(num_rows, batch_size), before + after)
    first = loader(num_rows, batch_size)
    assert read(first, before) == whole[:before]
    second = loader(num_rows, batch_size)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert read(second, after) == whole[before:]


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    train = loader(9)
    first, second = ([row for batch in read(train, 3) for row in batch] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(9))
    assert first != second
    assert [row for batch in read(loader(9, seed=1), 3) for row in batch] != first


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_processes_share_every_step_without_overlap(world_size: int, batch_size: int, steps: int) -> None:
    whole = loader(30, batch_size * world_size)
    parts = [loader(30, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = read(whole, steps)
    for rank, part in enumerate(parts):
        assert read(part, steps) == [batch[rank::world_size] for batch in together]
        assert part.state_dict() == whole.state_dict()


def test_resume_with_another_number_of_processes_goes_on_at_the_same_row() -> None:
    one = loader(12, 2)
    read(one, 3)
    rest = [row for batch in read(loader(12, 2), 6)[3:] for row in batch]
    halves = [loader(12, 1, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(one.state_dict())
    assert [
        row for pair in zip(*(read(half, 3) for half in halves), strict=True) for batch in pair for row in batch
    ] == rest


def test_a_batch_that_was_handed_out_but_not_processed_comes_again() -> None:
    processed = 0
    order = EpochOrder(rows=Numbers(10), seed=0)
    train = TrainLoader(order=order, batch_size=3, processed=lambda: processed)
    batches = iter(train)
    next(batches)
    processed = 1
    interrupted = next(batches)["tokens"].tolist()
    again = loader()
    again.load_state_dict(train.state_dict())
    assert read(again, 1) == [interrupted]


def test_other_data_begin_a_new_epoch() -> None:
    train = loader(10)
    read(train, 2)
    other = loader(11)
    other.load_state_dict(train.state_dict())
    assert other.state_dict() == {"epoch": 1, "position": 0, "order": "11-0"}


def test_workers_change_nothing() -> None:
    assert read(loader(num_workers=1), 4) == read(loader(), 4)


def test_too_few_rows_for_a_step_are_refused() -> None:
    with pytest.raises(
        ValueError, match="give 10 rows, fewer than one batch of 6 on each of 2 processes; lower batch_size"
    ):
        loader(10, 6, world_size=2)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
def test_evaluation_gives_equal_disjoint_parts(num_rows: int, world_size: int, batch_size: int, limit: int) -> None:
    if min(num_rows, limit) < world_size:
        with pytest.raises(ValueError, match="fewer than"):
            EvalLoader(rows=Numbers(num_rows), batch_size=batch_size, limit=limit, world_size=world_size)
        return
    parts = [
        EvalLoader(rows=Numbers(num_rows), batch_size=batch_size, limit=limit, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    read_rows = [[row for batch in part for row in batch["tokens"].tolist()] for part in parts]
    assert len({len(part) for part in parts}) == len({len(rows) for rows in read_rows}) == 1
    together = [row for rows in read_rows for row in rows]
    assert len(set(together)) == len(together) > min(num_rows, limit) - world_size


def test_a_limit_spreads_evenly() -> None:
    ids = np.arange(10)
    assert evenly_spread(ids, None).tolist() == evenly_spread(ids, 10).tolist() == list(range(10))
    assert evenly_spread(ids, 5).tolist() == [1, 3, 5, 7, 9]
    assert evenly_spread(ids, 2).tolist() == [2, 7]
