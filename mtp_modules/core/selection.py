"""Rows of a batch end one by one; the others go on without all being copied."""

import numpy as np

from mtp_modules.core.shapes import Array, Int


def holes_filled(going_on: Int[Array, " N"]) -> list[int]:
    """Return the rows that go on in an order in which few change their place: the last ones take that of the ended.

    Args:
        going_on: Ascending.
    """
    count = len(going_on)
    rows, staying = np.full(count, -1), going_on[going_on < count]
    rows[staying] = staying
    rows[rows < 0] = going_on[len(staying) :]
    return rows.tolist()


def moved(rows: list[int]) -> tuple[list[int], list[int]]:
    """Return which places get another row, and which: what a selection in place has to copy, all of it at once.

    Args:
        rows: What is selected, in its new order; no more than there are places.
    """
    numbers = np.array(rows)
    places = np.flatnonzero(numbers != np.arange(len(numbers)))
    return places.tolist(), numbers[places].tolist()
