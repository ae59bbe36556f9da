"""What trunks and heads remember while decoding."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Int, Shaped, Tensor


def bucket_of(length: int) -> int:
    """Return the next of 64, 96, 128, 192, 256, 384 and so on: the few sizes that CUDA graphs are captured for.

    Args:
        length: At least 1.
    """
    size = max(64, 1 << (length - 1).bit_length())
    return size * 3 // 4 if size > 64 and length <= size * 3 // 4 else size


class StaticMemory:
    """Tensors that stay at one address from run to run, as CUDA graphs need for what they write in place.

    Args:
        on_new: Called with every tensor that is allocated.
    """

    def __init__(self, on_new: Callable[[Tensor], None]) -> None:
        self._on_new, self._tensors = on_new, dict[tuple[object, ...], Tensor]()

    def tensor(self, name: str, shape: tuple[int, ...], like: Tensor) -> Shaped[Tensor, "..."]:
        """Return the tensor of this name and shape; what an earlier run has left in it is still there.

        Args:
            name: Of its role in the state.
            shape: Its size.
            like: A tensor of the same dtype and device.
        """
        key = name, shape, like.dtype, like.device
        if key not in self._tensors:
            self._tensors[key] = like.new_zeros(shape)
            self._on_new(self._tensors[key])
        return self._tensors[key]


class DecodingState(ABC):
    """What a module remembers of the tokens it has read, one row a sequence.

    A forward pass with a state *appends* a chunk to every row, at that row's own length. The chunk is provisional until
    ``commit`` says how many of its tokens stay. Invariant: after ``commit``, the state and everything computed from it
    later equal those of a fresh state that has read only the kept tokens.

    A chunk may reach beyond the trunk's last position, for all rows of a batch read chunks of one length; what lies
    there means nothing, and ``commit`` refuses to keep it.
    """

    lengths: list[int]
    """Committed tokens of each row, on the CPU, where the decoding loop decides."""

    def begin(self, chunk: int) -> None:
        """Announce the chunk that ``read`` is about to append, and do all of its CPU-side bookkeeping.

        Args:
            chunk: Number of its tokens.

        Raises:
            ValueError: If this kind of state does its bookkeeping while it reads, or the chunk does not fit.
        """
        refuse(self, "does its bookkeeping while a chunk is read; decode without compiling.")

    def for_graphs(self, memory: StaticMemory | None = None) -> None:
        """Prepare an empty state for compiled rounds: what differs between rounds costs a compilation.

        Args:
            memory: Where to keep what rounds write in place, at addresses that stay and in sizes that seldom change;
                ``None`` for tensors of the state's own, whose sizes may change.
        """
        return

    def prepare_drafts(self) -> None:
        """Do the CPU-side bookkeeping of drafting after the last commit, so that drafting is tensor operations only."""
        return

    def dynamic_axes(self) -> list[tuple[Tensor, int]]:
        """Return the tensors whose length may differ from round to round, each once, and along which axis it does."""
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
