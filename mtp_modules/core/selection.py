"""Rows of a batch end one by one; the others go on without all being copied."""


def holes_filled(going_on: list[int]) -> list[int]:
    """Return the rows that go on in an order in which few change their place: the last ones take that of the ended.

    Args:
        going_on: Ascending.
    """
    count = len(going_on)
    staying = {index for index in going_on if index < count}
    behind = iter(going_on[len(staying) :])
    return [place if place in staying else next(behind) for place in range(count)]


def moved(rows: list[int]) -> tuple[list[int], list[int]]:
    """Return which places get another row, and which: what a selection in place has to copy, all of it at once.

    Args:
        rows: What is selected, in its new order; no more than there are places.
    """
    places = [place for place, row in enumerate(rows) if place != row]
    return places, [rows[place] for place in places]
