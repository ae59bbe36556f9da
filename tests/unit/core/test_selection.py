"""Rows that end leave holes, which the last rows fill."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.core.selection import holes_filled, moved


@given(ends=st.lists(st.booleans(), min_size=1, max_size=9))
def test_few_rows_move_and_none_is_lost(ends: list[bool]) -> None:
    going_on = np.flatnonzero(np.logical_not(ends))
    rows = holes_filled(going_on)
    assert sorted(rows) == going_on.tolist()
    assert len(moved(rows)[0]) == sum(ends[: len(going_on)])


@given(data=st.data(), count=st.integers(1, 6))
def test_what_is_moved_makes_the_selection(data: st.DataObject, count: int) -> None:
    rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count))
    held, (places, sources) = torch.arange(count), moved(rows)
    held[places] = held[sources]
    assert held[: len(rows)].tolist() == rows
    assert all(place != source for place, source in zip(places, sources, strict=True))
