"""Rows of whole documents."""

import hashlib
from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_modules.core.checks import refuse
from mtp_modules.data.rows import IntArray, TokenRows
from mtp_modules.data.streams import TokenStream
from mtp_modules.data.windows import check_window


class PackedRows(TokenRows):
    """Rows that hold whole documents, so that no conversation is cut: each where it leaves the least room (best fit).

    A row has room for ``window + 1`` tokens, all of which horizon 1 reads or predicts; what is left is padding, which
    is not trained on. A document that is longer than a row is cut into rows, of which the last is shared.

    Args:
        stream: Concatenated documents.
        window: Positions ``T`` that the trunk reads.
        lookahead: The largest horizon.
        name: Name of the stream in error messages.

    Raises:
        ValueError: If the stream is empty, or a size is invalid.
    """

    def __init__(self, *, stream: TokenStream, window: int, lookahead: int, name: str = "text") -> None:
        check_window(self, window, lookahead)
        if not len(stream.tokens):
            refuse(self, f"the {name} has 0 tokens; give more text.")
        self.stream, self.window, self.lookahead = stream, window, lookahead
        starts = stream.document_starts
        ends = np.append(starts[1:], len(stream.tokens))
        self._starts, self._lengths = _cut(starts, ends, window + 1)
        rows = best_fit(self._lengths, window + 1)
        order = np.argsort(rows, kind="stable")
        self.num_rows = int(rows.max()) + 1
        self._pieces = order
        self._first = np.searchsorted(rows[order], np.arange(self.num_rows + 1))

    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return ``tokens``, ``document_ids`` and ``loss_mask``, which is false at padding.

        Args:
            ids: Numbers of rows, ``(B,)``.

        Shape:
            each ``(B, window + lookahead)``.
        """
        shape = (len(ids), self.window + self.lookahead)
        tokens, documents = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        learned = np.zeros(shape, dtype=bool)
        for row, number in enumerate(ids.tolist()):
            place = 0
            for index, piece in enumerate(self._pieces[self._first[number] : self._first[number + 1]]):
                start, length = int(self._starts[piece]), int(self._lengths[piece])
                here = slice(place, place + length)
                tokens[row, here] = self.stream.tokens[start : start + length]
                documents[row, here] = index
                mask = self.stream.loss_mask
                learned[row, here] = True if mask is None else mask[start : start + length]
                place += length
            documents[row, place:] = len(tokens[row])
        return {
            "tokens": torch.from_numpy(tokens),
            "document_ids": torch.from_numpy(documents),
            "loss_mask": torch.from_numpy(learned),
        }

    def digest(self) -> str:
        """Return a hash of the text and the sizes."""
        text = f"packed {self.stream.digest()} {self.window} {self.lookahead}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _cut(starts: IntArray, ends: IntArray, room: int) -> tuple[IntArray, IntArray]:
    """Return start and length of every piece; the pieces of a long document share one token.

    So every token but a document's first is predicted once.
    """
    counts = np.maximum(1, -(-(ends - starts - 1) // (room - 1)))
    documents = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(documents)) - np.repeat(counts.cumsum() - counts, counts)
    first = starts[documents] + number * (room - 1)
    return first, np.minimum(ends[documents] - first, room)


def best_fit(lengths: IntArray, room: int) -> npt.NDArray[np.int64]:
    """Return the row of every piece: the longest first, each into the row where it leaves the least room.

    Args:
        lengths: Of the pieces, at most ``room``.
        room: Of a row.

    Example:
        >>> best_fit(np.array([3, 5, 4, 2, 1]), 6).tolist()
        [2, 0, 1, 1, 0]
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: dict[int, list[int]] = {}  # by the room that they have left
    rooms: list[int] = []  # those that occur, ascending
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            left = rooms[place]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], rooms[place]
        else:
            row, left, count = count, room, count + 1
        rows[piece] = row
        if left := left - length:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    return rows
