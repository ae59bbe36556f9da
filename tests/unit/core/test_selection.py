"""Rows that end leave holes, which the last rows fill."""

from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.core.selection import holes_filled, moves_into_holes


@given(ends=st.lists(st.booleans(), min_size=1, max_size=9))
def test_few_rows_move_and_none_is_lost(ends: list[bool]) -> None:
    going_on = [row for row, ended in enumerate(ends) if not ended]
    rows = holes_filled(going_on)
    assert sorted(rows) == going_on
    moves = moves_into_holes(rows)
    assert moves is not None
    assert len(moves[0]) == sum(ends[: len(going_on)])


@given(data=st.data(), count=st.integers(1, 6))
def test_moves_in_place_are_the_selection_or_there_are_none(data: st.DataObject, count: int) -> None:
    rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count + 2))
    moves, held = moves_into_holes(rows), list(range(count))
    if moves is None:
        assert any(row != place and row < len(rows) for place, row in enumerate(rows))
        return
    for place, row in zip(*moves, strict=True):
        held[place] = held[row]
    assert held[: len(rows)] == rows
