"""Drafts behind the hypotheses of a beam search: trees, and the rows in which a forward pass reads them."""

from typing import NamedTuple

import numpy as np

from mtp_modules.core.shapes import Array, Bool, Int


class Drafts(NamedTuple):
    """Paths that a search by the heads has followed, ``S`` of a prompt at each depth, none of them twice.

    Attributes:
        tokens: The draft in which each ends.
        sources: The path that it makes longer, its slot one depth before; at the first, the hypothesis that it follows.
        possible: Whether there is such a path.
    """

    tokens: Int[Array, "B K S"]
    sources: Int[Array, "B K S"]
    possible: Bool[Array, "B K S"]


class Paths:
    """Drafts, and the hypotheses that they follow, as trees: a node has a prompt, a depth (0 a hypothesis) and a slot.

    A row is read for every longest path; it holds the others.

    Args:
        last: The last token of every hypothesis.
        going_on: Which hypotheses are not finished; those are roots.
        drafts: Behind them; ``None`` for none.
        most: How deep the drafts of each prompt are of use.
        whole_blocks: Whether only the deepest paths of a prompt are wanted.

    A slot or a row of ``-1`` stands for none.

    Attributes:
        prompts: Of each row.
        roots: Of each row, counted over all prompts.
        chunks: What each row reads: the last token of a root, and drafts; zeros behind.
        root_rows: A row that holds each hypothesis, none for a finished one.
    """

    def __init__(
        self,
        last: Int[Array, "B W"],
        going_on: Bool[Array, "B W"],
        drafts: Drafts | None,
        most: Int[Array, " B"],
        *,
        whole_blocks: bool = False,
    ) -> None:
        prompts, roots = np.nonzero(going_on)
        number: Int[Array, "B W"] = np.full(going_on.shape, -1)
        number[prompts, roots] = np.arange(len(prompts))
        self._nodes = None if drafts is None else _Nodes(last, going_on, drafts, most, whole_blocks=whole_blocks)
        if self._nodes is None:
            self.prompts, self.roots, self.root_rows = prompts, np.arange(len(prompts)), number
            self.chunks: Int[Array, "R C"] = last[prompts, roots][:, None]
        else:
            self.prompts, self.chunks = self._nodes.prompts, self._nodes.chunks
            self.roots = number[self.prompts, self._nodes.slots[:, 0]]
            self.root_rows = self._nodes.rows[:, 0, : last.shape[1]]

    def following(
        self, depths: Int[Array, " B"], slots: Int[Array, "B W"], tokens: Int[Array, "B W"]
    ) -> tuple[Int[Array, "B W"], Int[Array, "B W"]]:
        """Return the slots and the rows of the nodes that follow others by some tokens.

        Args:
            depths: Of the others, one of each prompt.
            slots: Theirs; any where there is no node, if its token is no token.
            tokens: What follows.
        """
        if self._nodes is None:
            none = np.full(tokens.shape, -1)
            return none, none
        return self._nodes.following(depths, slots, tokens)

    def blocks(self) -> "Blocks | None":
        """Return the paths that are as deep as drafts are of use to their prompt; ``None`` if there are no drafts."""
        return None if self._nodes is None or self.chunks.shape[1] == 1 else self._nodes.blocks()


class Blocks(NamedTuple):
    """Whole blocks of drafts, ``Z`` of a prompt or fewer; none where the heads found no possible draft to end one.

    Attributes:
        there: Whether there is such a block.
        depths: How many drafts each block of a prompt has.
        rows: The row that holds each.
        drafts: Theirs.
        slots: Of the nodes that a path goes through: the hypothesis, then the drafts.
    """

    there: Bool[Array, "B Z"]
    depths: Int[Array, " B"]
    rows: Int[Array, "B Z"]
    drafts: Int[Array, "B Z K"]
    slots: Int[Array, "B Z C"]


class _Nodes:
    """The nodes of all trees, by prompt, depth and slot, and the rows in which they are read; see :class:`Paths`."""

    def __init__(
        self,
        last: Int[Array, "B W"],
        going_on: Bool[Array, "B W"],
        drafts: Drafts,
        most: Int[Array, " B"],
        *,
        whole_blocks: bool,
    ) -> None:
        (count, roots), (_, depth, width) = last.shape, drafts.tokens.shape
        shape = (count, depth + 2, max(roots, width))  # nothing is at the last depth
        self._tokens: Int[Array, "B D Z"] = np.zeros(shape, dtype=np.int64)
        self._sources: Int[Array, "B D Z"] = np.zeros(shape, dtype=np.int64)
        self._there: Bool[Array, "B D Z"] = np.zeros(shape, dtype=bool)
        self._tokens[:, 0, :roots], self._there[:, 0, :roots] = last, going_on
        inner = np.s_[:, 1:-1, :width]
        self._tokens[inner], self._sources[inner] = drafts.tokens, drafts.sources
        self._there[inner] = drafts.possible & (np.arange(1, depth + 1) <= most[:, None])[:, :, None]
        self._deepest: Int[Array, " B"] = self._there[:, 1:].any(axis=2).sum(axis=1)
        self._whole: Bool[Array, " B"] = (self._deepest > 0) & (self._deepest == np.minimum(most, depth))
        if whole_blocks:
            self._drop_short_ones()
        self._lay_out()

    def _drop_short_ones(self) -> None:
        """Drop all drafts that no deepest path goes through."""
        for depth in range(self._there.shape[1] - 3, 0, -1):
            self._there[:, depth] &= self._go_on()[:, depth] | (self._deepest == depth)[:, None]

    def _go_on(self) -> Bool[Array, "B D Z"]:
        """Say which nodes have drafts behind them."""
        found = np.zeros_like(self._there)
        prompt, depth, slot = np.nonzero(self._there[:, 1:])
        found[prompt, depth, self._sources[prompt, depth + 1, slot]] = True
        return found

    def _lay_out(self) -> None:
        longest = self._there & ~self._go_on()
        prompts, depths, slots = np.nonzero(longest)
        self.prompts: Int[Array, " R"] = prompts
        size = int(depths.max()) + 1
        self.chunks: Int[Array, "R C"] = np.zeros((len(prompts), size), dtype=np.int64)
        self.slots: Int[Array, "R C"] = np.zeros_like(self.chunks)
        for depth in range(size - 1, -1, -1):
            inside = depths >= depth
            self.slots[:, depth] = slots
            self.chunks[:, depth] = np.where(inside, self._tokens[prompts, depth, slots], 0)
            slots = np.where(inside, self._sources[prompts, depth, slots], slots)
        self.rows: Int[Array, "B D Z"] = np.full(self._there.shape, -1)
        self.rows[longest] = np.arange(len(prompts))
        for depth in range(size - 1, 0, -1):
            prompt, slot = np.nonzero(self._there[:, depth])
            self.rows[prompt, depth - 1, self._sources[prompt, depth, slot]] = self.rows[prompt, depth, slot]

    def following(
        self, depths: Int[Array, " B"], slots: Int[Array, "B W"], tokens: Int[Array, "B W"]
    ) -> tuple[Int[Array, "B W"], Int[Array, "B W"]]:
        """See :meth:`Paths.following`."""
        prompts, after = np.arange(len(depths)), np.minimum(depths + 1, self._there.shape[1] - 1)
        there, new, sources = (part[prompts, after] for part in (self._there, self._tokens, self._sources))
        same = (new[:, None] == tokens[:, :, None]) & (sources[:, None] == slots[:, :, None]) & there[:, None]
        slots = np.where(same.any(axis=2), same.argmax(axis=2), -1)
        return slots, np.where(slots < 0, -1, self.rows[prompts[:, None], after[:, None], slots])

    def blocks(self) -> Blocks:
        """See :meth:`Paths.blocks`."""
        prompts = np.arange(len(self._deepest))
        there = self._there[prompts, self._deepest] & self._whole[:, None]
        rows = np.where(there, self.rows[prompts, self._deepest], 0)
        return Blocks(there, self._deepest, rows, self.chunks[rows][:, :, 1:], self.slots[rows])
