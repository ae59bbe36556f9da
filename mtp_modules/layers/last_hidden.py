"""The last hidden states of each row, from which heads without attention draft."""

from typing import Any

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.layers.chunks import ChunkedState


class LastHiddenState(ChunkedState):
    """The hidden states at each row's last tokens, from which heads without attention draft.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Maximum tokens per row, the chunk included.
        count: For how many last tokens to keep states; 0 if nothing is drafted.
    """

    def __init__(self, batch_size: int, capacity: int, *, count: int = 1) -> None:
        super().__init__(batch_size, capacity)
        self.count = count
        self._recent: Float[Tensor, "B C D"] | None = None
        self._pending: Float[Tensor, "B T D"] | None = None
        self.scratch: Any = None
        """Values that heads keep from one draft of a round to the next; cleared at the end of the round."""

    def append(self, hidden: Float[Tensor, "B T D"]) -> None:
        """Store the states of the announced chunk until ``commit``.

        Args:
            hidden: The trunk's output for the chunk.
        """
        self._pending = hidden

    def expect_tree(self, parents: Int[Tensor, "B C"], depth: int) -> None:
        """Announce that the next chunk is a tree."""
        self.parents, self.depth = parents, depth

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the chunk, or of the path in it, in row ``b``."""
        super().commit(keep, path)
        if self.count:
            self._recent = self._last_of(keep, path)
        self._pending = self.scratch = None

    def _last_of(self, keep: list[int], path: Int[Tensor, "B P"] | None) -> Float[Tensor, "B C D"]:
        """Return the states of the last ``count`` kept tokens."""
        assert self._pending is not None
        read = self._pending if path is None else at_positions(self._pending, path)
        first = 0
        if min(keep) < self.count:
            before = read.new_zeros(len(keep), self.count, read.shape[2]) if self._recent is None else self._recent
            read, first = torch.cat((before, read), dim=1), self.count
        if min(keep) == max(keep):
            end = first + keep[0]
            return read[:, end - self.count : end].clone(memory_format=torch.contiguous_format)
        ends = torch.tensor(keep, device=read.device)[:, None] + first
        return at_positions(read, ends + torch.arange(-self.count, 0, device=read.device))

    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only."""
        super().select(rows)
        self.scratch = None
        if self._recent is not None:
            self._recent = self._recent[rows]

    @property
    def empty(self) -> bool:
        """Whether nothing has been committed yet."""
        return self._recent is None

    @property
    def last(self) -> Float[Tensor, "B D"]:
        """The hidden state at each row's last committed token."""
        return self.back(0)

    def back(self, count: int) -> Float[Tensor, "B D"]:
        """Return the hidden state ``count`` tokens before each row's last committed token; zeros before the first.

        Args:
            count: Number of tokens to go back, less than the number of states that are kept.
        """
        if self._recent is None:
            refuse(self, "nothing was committed yet; read a prompt first.")
        return self._recent[:, -1 - count]
