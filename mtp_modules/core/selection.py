"""Row selection after some rows of a batch have finished, with as few copies as possible."""

import numpy as np

from mtp_modules.core.shapes import Array, Int


def holes_filled(going_on: Int[Array, " N"]) -> list[int]:
    """Return the unfinished rows in an order that moves few of them: the last rows fill the holes of finished ones.

    Args:
        going_on: Indices of the unfinished rows, ascending.
    """
    count = len(going_on)
    rows, staying = np.full(count, -1), going_on[going_on < count]
    rows[staying] = staying
    rows[rows < 0] = going_on[len(staying) :]
    return rows.tolist()


def moved(rows: list[int]) -> tuple[list[int], list[int]]:
    """Return the destination and source indices that an in-place selection has to copy, all in one operation.

    Args:
        rows: Selected rows in their new order; at most as many as there are rows.
    """
    sources = np.array(rows)
    targets = np.flatnonzero(sources != np.arange(len(sources)))
    return targets.tolist(), sources[targets].tolist()
