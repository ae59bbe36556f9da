"""Trees of drafts behind the hypotheses of a beam search, and the rows in which a forward pass reads them."""

from typing import NamedTuple

import numpy as np

from mtp_modules.core.shapes import Array, Bool, Int
from mtp_modules.decoders.beam.hypotheses import Hypotheses


class Drafts(NamedTuple):
    """Paths that a beam search over the heads' distributions has kept, ``S`` of a prompt at each depth, all different.

    Attributes:
        tokens: The draft in which each ends.
        parents: The path that it makes longer, its slot one depth before; at the first, the hypothesis that it follows.
        possible: Whether there is such a path.
    """

    tokens: Int[Array, "B K S"]
    parents: Int[Array, "B K S"]
    possible: Bool[Array, "B K S"]


class DraftTrees:
    """A tree of drafts behind each hypothesis that is not finished.

    A node has a prompt, a depth and a slot: the hypotheses are at depth 0, what the heads drafted behind them at 1, 2,
    and so on. A forward pass reads one row a leaf, the path that leads to it, so a node may lie in several rows.

    Args:
        hypotheses: Those that are not finished are roots.
        drafts: Behind them; ``None`` for none.
        useful: How deep the drafts of each prompt are of use.
        whole_blocks: Whether to keep only the deepest paths of a prompt.

    Attributes:
        prompts: Of each row, its place among the prompts that go on.
        chunks: What each row reads: the last token of a root, then drafts; zeros behind.
        slots: Of the nodes that each row goes through, from the root on.
        deepest: How deep the trees of each prompt are; of whole blocks only.
    """

    prompts: Int[Array, " R"]
    chunks: Int[Array, "R C"]
    slots: Int[Array, "R C"]
    deepest: Int[Array, " B"]

    def __init__(
        self, hypotheses: Hypotheses, drafts: Drafts | None, useful: Int[Array, " B"], *, whole_blocks: bool = False
    ) -> None:
        if drafts is None:  # a row a root
            self.prompts, slots = np.nonzero(hypotheses.going_on)
            self.slots, self.chunks = slots[:, None], hypotheses.last()[hypotheses.going_on][:, None]
            self._rows = hypotheses.numbers[:, None]
            return
        (count, width), (_, depth, num_paths) = hypotheses.lengths.shape, drafts.tokens.shape
        shape = (count, depth + 2, max(width, num_paths))  # no node is at the last depth
        self._tokens = np.zeros(shape, dtype=np.int64)
        self._parents = np.zeros(shape, dtype=np.int64)
        self._exists = np.zeros(shape, dtype=bool)
        self._tokens[:, 0, :width], self._exists[:, 0, :width] = hypotheses.last(), hypotheses.going_on
        inner = np.s_[:, 1:-1, :num_paths]
        self._tokens[inner], self._parents[inner] = drafts.tokens, drafts.parents
        self._exists[inner] = drafts.possible & (np.arange(1, depth + 1) <= useful[:, None])[:, :, None]
        if whole_blocks:
            self._keep_blocks(np.minimum(useful, depth))
        self._lay_out(self._exists & ~self._have_children())

    def _keep_blocks(self, size: Int[Array, " B"]) -> None:
        """Drop the drafts that no deepest path of their prompt goes through; whole ones have the size of a block."""
        self.deepest = self._exists[:, 1:].any(axis=2).sum(axis=1)
        self._whole = (self.deepest > 0) & (self.deepest == size)
        for level in range(self._exists.shape[1] - 3, 0, -1):
            self._exists[:, level] &= self._have_children()[:, level] | (self.deepest == level)[:, None]

    def _have_children(self) -> Bool[Array, "B D Z"]:
        found = np.zeros_like(self._exists)
        prompt, depth, slot = np.nonzero(self._exists[:, 1:])
        found[prompt, depth, self._parents[prompt, depth + 1, slot]] = True
        return found

    def _lay_out(self, leaves: Bool[Array, "B D Z"]) -> None:
        """Give every leaf a row, and every node one of the rows that go through it; -1 where there is no node."""
        self.prompts, depths, slots = np.nonzero(leaves)
        levels = np.arange(depths.max() + 1)
        inside = levels <= depths[:, None]
        self.slots = np.zeros(inside.shape, dtype=np.int64)
        for level in levels[::-1]:
            self.slots[:, level] = slots
            slots = np.where(inside[:, level], self._parents[self.prompts, level, slots], slots)
        tokens = self._tokens[self.prompts[:, None], levels, self.slots]
        self.chunks = np.where(inside, tokens, 0)
        self._rows = np.full(self._exists.shape, -1)
        row, level = np.nonzero(inside)
        self._rows[self.prompts[row], level, self.slots[row, level]] = row

    def rows(self, depths: Int[Array, " B"], slots: Int[Array, "B W"]) -> Int[Array, "B W"]:
        """Return a row for each node, of which those of a prompt have one depth; any number where the slot is -1."""
        return self._rows[np.arange(len(depths))[:, None], depths[:, None], slots]

    def children(self, depths: Int[Array, " B"], hypotheses: Hypotheses) -> Int[Array, "B W"]:
        """Return the slots of the nodes at ``depths + 1`` to which their last tokens lead hypotheses; -1 for none."""
        if self.chunks.shape[1] == 1:  # no drafts
            return np.full(hypotheses.nodes.shape, -1)
        tokens, slots = hypotheses.last(), hypotheses.nodes
        prompts, after = np.arange(len(depths)), np.minimum(depths + 1, self._exists.shape[1] - 1)
        exists, drafts, parents = (part[prompts, after] for part in (self._exists, self._tokens, self._parents))
        same = (drafts[:, None] == tokens[:, :, None]) & (parents[:, None] == slots[:, :, None]) & exists[:, None]
        return np.where(same.any(axis=2), same.argmax(axis=2), -1)

    def blocks(self) -> tuple[Bool[Array, "B Z"], Int[Array, "B Z"]]:
        """Return which nodes end whole blocks, those as deep as drafts are of use to their prompt, and their rows."""
        prompts = np.arange(len(self.deepest))
        exists = self._exists[prompts, self.deepest] & self._whole[:, None]
        return exists, np.where(exists, self._rows[prompts, self.deepest], 0)
