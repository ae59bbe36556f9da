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


def moves_into_holes(rows: list[int]) -> tuple[list[int], list[int]] | None:
    """Return which rows are overwritten, and with which, where a selection can be made in place; ``None`` where not.

    It can where every row stays in its place, or comes from behind all places that are left.

    Args:
        rows: What is selected, in its new order.
    """
    moved = [(place, row) for place, row in enumerate(rows) if place != row]
    if any(row < len(rows) for _, row in moved):
        return None
    return [place for place, _ in moved], [row for _, row in moved]
