"""CPU-side bookkeeping of decoding states: lengths and the uncommitted chunk."""

from operator import add

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Int, Tensor


class ChunkedState(DecodingState):
    """Bookkeeping that all states share: committed lengths, capacity, and the uncommitted chunk.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Maximum tokens per row, the chunk included.
        max_positions: Maximum tokens that a row can keep; ``None`` for no limit. A chunk may extend beyond, so that
            rows near the limit stay in the batch, but tokens beyond the limit cannot be committed.
    """

    def __init__(self, batch_size: int, capacity: int, *, max_positions: int | None = None) -> None:
        self.lengths = [0] * batch_size
        self.capacity, self.max_positions = capacity, max_positions
        self.chunk = 0
        self.parents: Int[Tensor, "B C"] | None = None
        self.depth = 0

    def begin(self, chunk: int) -> None:
        """Announce a chunk that the next forward pass appends to every row.

        Args:
            chunk: Number of its tokens.

        Raises:
            ValueError: If the last chunk was not committed, the state would overflow, or a row is full.
        """
        if self.chunk:
            refuse(self, "the last chunk was not committed; call commit(keep) before the next forward pass.")
        if max(self.lengths) + chunk > self.capacity:
            refuse(
                self,
                f"capacity is {self.capacity} tokens per row, a chunk of {chunk} after {max(self.lengths)} needs "
                f"{max(self.lengths) + chunk}; ask new_state for more.",
            )
        self._within(max(self.lengths) + 1)
        self.chunk = chunk

    def _within(self, length: int) -> None:
        if self.max_positions is not None and length > self.max_positions:
            refuse(
                self,
                f"a row of {length} tokens is longer than max_positions={self.max_positions}; "
                "keep fewer tokens, or build trunk and heads with more positions.",
            )

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the chunk, or of the path in it, in row ``b``."""
        if not self.chunk:
            refuse(self, "there is no chunk to commit; run a forward pass with this state first.")
        if len(keep) != len(self.lengths) or min(keep) < 0 or max(keep) > self.chunk:
            refuse(self, f"keep must hold {len(self.lengths)} numbers from 0 to {self.chunk}, got {keep}.")
        if (self.parents is None) != (path is None):
            refuse(self, "path is needed for a chunk that is a tree, and only for that; call commit(keep, path).")
        lengths = list(map(add, self.lengths, keep))
        self._within(max(lengths))
        self.lengths = lengths
        self.chunk, self.parents = 0, None

    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only."""
        if self.chunk:
            refuse(self, "the last chunk was not committed; call commit(keep) before select(rows).")
        self.lengths = list(map(self.lengths.__getitem__, rows))
