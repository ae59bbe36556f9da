"""Decoding states: what trunks and heads keep of the tokens that they have read."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Int, Shaped, Tensor


def bucket_of(length: int) -> int:
    """Round up to one of 64, 96, 128, 192, 256, 384 and so on, the few sizes for which CUDA graphs are captured.

    Args:
        length: At least 1.
    """
    size = max(64, 1 << (length - 1).bit_length())
    return size * 3 // 4 if size > 64 and length <= size * 3 // 4 else size


class StaticMemory:
    """Tensors that keep their address from run to run, as CUDA graphs require of what they write in place.

    Args:
        on_new: Called with every newly allocated tensor.
    """

    def __init__(self, on_new: Callable[[Tensor], None]) -> None:
        self._on_new, self._tensors = on_new, dict[tuple[object, ...], Tensor]()

    def tensor(self, name: str, shape: tuple[int, ...], like: Tensor) -> Shaped[Tensor, "..."]:
        """Return the tensor of this name and shape, with the values that earlier runs have left in it.

        Args:
            name: Role of the tensor in the state.
            shape: Shape of the tensor.
            like: A tensor of the same dtype and device.
        """
        key = name, shape, like.dtype, like.device
        if key not in self._tensors:
            self._tensors[key] = like.new_zeros(shape)
            self._on_new(self._tensors[key])
        return self._tensors[key]


class DecodingState(ABC):
    """What a module keeps of the tokens it has read, one row per sequence.

    A forward pass with a state *appends* a chunk to every row, at that row's own length. The chunk is provisional until
    ``commit`` keeps some of its tokens. Invariant: after ``commit``, the state and everything computed from it later
    equal those of a fresh state that has read only the kept tokens.

    A chunk may extend beyond the trunk's last position, because all rows of a batch read chunks of the same length. The
    results there are meaningless, and ``commit`` raises an error if they are to be kept.
    """

    lengths: list[int]
    """Committed tokens of each row, on the CPU, where the decoding loop uses them."""

    def begin(self, chunk: int) -> None:
        """Announce the chunk that ``read`` will append, and do all of its CPU-side bookkeeping.

        Args:
            chunk: Number of its tokens.

        Raises:
            ValueError: If this kind of state does its bookkeeping while it reads, or the chunk does not fit.
        """
        refuse(self, "does its bookkeeping while a chunk is read; decode without compiling.")

    def for_graphs(self, memory: StaticMemory | None = None) -> None:
        """Prepare an empty state for compiled rounds, where every difference between rounds costs a compilation.

        Args:
            memory: Holds the tensors that rounds write in place, at fixed addresses and in few sizes; ``None`` for
                tensors that the state allocates itself, whose sizes may change.
        """
        return

    def prepare_drafts(self) -> None:
        """Do the CPU-side bookkeeping of drafting after the last commit, so that drafting is tensor operations only."""
        return

    def dynamic_axes(self) -> list[tuple[Tensor, int]]:
        """Return each tensor whose size may differ from round to round, once, with the axis along which it differs."""
        return []

    @abstractmethod
    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the last chunk in row ``b``, and discard the others.

        Args:
            keep: One number per row, from 0 to the length of the chunk.
            path: If the chunk was a tree: indices in the chunk of the tokens to keep, from the root on.

        Raises:
            ValueError: If there is no chunk, or a number is out of range.
        """

    def expect_tree(self, parents: Int[Tensor, "B C"], depth: int) -> None:
        """Announce that the next chunk is a tree.

        Args:
            parents: Index in the chunk of each token's parent; -1 for the first token, the root. A parent comes before
                its children.
            depth: Depth of the tree: the longest path below the root, in tokens.

        Raises:
            ValueError: If this kind of state cannot hold a tree.
        """
        refuse(self, "can hold no tree of drafts, only a chain; decode without a tree.")

    @abstractmethod
    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only; the state must be committed.

        Args:
            rows: Which rows to keep, in their new order. A row that is named twice becomes two independent rows.
        """
