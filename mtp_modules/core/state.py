"""What trunks and heads remember while decoding."""

from abc import ABC, abstractmethod

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Int, Tensor


def bucket_of(length: int) -> int:
    """Return the next of 64, 96, 128, 192, 256, 384 and so on: sizes for what is recorded.

    Args:
        length: At least 1.
    """
    size = max(64, 1 << (length - 1).bit_length())
    return size * 3 // 4 if size > 64 and length <= size * 3 // 4 else size


class DecodingState(ABC):
    """What a module remembers of the tokens it has read, one row a sequence.

    A forward pass with a state *appends* a chunk to every row, at that row's own length. The chunk is provisional until
    ``commit`` says how many of its tokens stay. Law: after ``commit``, the state and everything computed from it later
    equal those of a fresh state that has read only the kept tokens.

    A chunk may reach beyond the trunk's last position, for all rows of a batch read chunks of one length; what lies
    there means nothing, and ``commit`` refuses to keep it.
    """

    lengths: list[int]
    """Committed tokens of each row. On the host: decoding decides there."""

    def begin(self, chunk: int) -> None:
        """Announce the chunk that ``read`` is about to append, and do all of its bookkeeping on the host.

        Args:
            chunk: Number of its tokens.

        Raises:
            ValueError: If this kind of state cannot be told beforehand, or the chunk does not fit.
        """
        refuse(self, "cannot be told of a chunk before it is read; decode without compiling.")

    def expect_graphs(self, *, same_sizes: bool = False) -> None:
        """Announce that graphs will read chunks, so that what differs between rounds should be little.

        Args:
            same_sizes: Rounds will be recorded. What ``read`` and drafting compute must depend on the tensors that this
                state holds, on their sizes, and on which are there, but not on its numbers on the host; and sizes
                should seldom change. The state may hold tensors, plain values, other states, and tuples and lists of
                them. No tensor may be a view of another one, no list may change in place, and what a round writes into
                tensors must be the same if it is done twice.

        Raises:
            ValueError: If this kind of state cannot promise that.
        """
        if same_sizes:
            refuse(self, "has other sizes in every round, so rounds cannot be recorded; decode with the model itself.")

    def settle(self) -> None:
        """Do on the host what drafting after the last commit needs, so that drafting is tensor operations only."""
        return

    def growing(self) -> list[tuple[Tensor, int]]:
        """Return tensors that rounds look at and whose length may differ, each once, and along which axis it does."""
        return []

    @abstractmethod
    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the last chunk in row ``b``, and forget the others.

        Args:
            keep: One number a row, from 0 to the length of the chunk.
            path: Where the chunk was a tree: places in the chunk of the tokens to keep, from the root on.

        Raises:
            ValueError: If there is no chunk, or a number lies outside.
        """

    def expect_tree(self, parents: Int[Tensor, "B C"], depth: int) -> None:
        """Announce that the next chunk is a tree.

        Args:
            parents: Place in the chunk of the token before each token; -1 for the first token, the root. A parent
                comes before its children.
            depth: Most tokens behind the root one after the other.

        Raises:
            ValueError: If this kind of state can hold no tree.
        """
        refuse(self, "can hold no tree of drafts, only a chain; decode without a tree.")

    @abstractmethod
    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only; the state must be committed.

        Args:
            rows: Which rows to keep, in their new order. A row that is named twice forks into two, which from then on
                have nothing to do with each other.
        """
