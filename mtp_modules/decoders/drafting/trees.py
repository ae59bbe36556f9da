"""Trees of drafts: several candidates a position, all verified by one forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.component import Component
from mtp_modules.core.drafts import Draft
from mtp_modules.core.interfaces import DecodingState, Heads, Trunk
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.decoders.drafting.drafter import Drafter, DraftingContext


class Tree(NamedTuple):
    """A chunk of the token emitted last, the root, and drafts behind it.

    Attributes:
        tokens: ``(B, C)``, the root first, parents before their children.
        parents: ``(B, C)``, place of each token's parent; -1 for the root.
    """

    tokens: Int[Tensor, "B C"]
    parents: Int[Tensor, "B C"]


class Guess(NamedTuple):
    """The heads' distribution of the next token after some drafts.

    Attributes:
        ranking: ``(B, N, V)``, the larger the sooner a token becomes a child.
        log_probs: ``(B, N, V)``, which the confidence in a path is the sum of.
    """

    ranking: Float[Tensor, "B N V"]
    log_probs: Float[Tensor, "B N V"]


class Grower:
    """Asks the heads for children, depth by depth.

    Args:
        heads: Of the model.
        state: Their state.
        token: The token that each row emitted last.
        embed: Embeds token ids.
        unembed: Turns states of a horizon into logits.
        guess: Turns logits at a depth into a guess.
    """

    def __init__(
        self,
        heads: Heads,
        state: DecodingState,
        token: Int[Tensor, " B"],
        embed: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor, int], Tensor],
        guess: Callable[[Tensor, int], Guess],
    ) -> None:
        self.heads, self.state, self.embed, self.unembed, self.guess = heads, state, embed, unembed, guess
        self.tokens = [token[:, None]]
        self.parents = [torch.full_like(token, -1)[:, None]]
        self.scores = [torch.zeros_like(token, dtype=torch.float64)[:, None]]
        self._before: Tensor | None = None
        self._frontier = self.tokens[0]
        self._places = torch.zeros_like(self._frontier)
        self._drafted_from = self._places
        self._depth = 0

    def grow(self, width: int, keep: int | None = None) -> None:
        """Give every token of the frontier children, which become the next frontier.

        Args:
            width: How many children.
            keep: Only so many of the new tokens, the most confident ones, are in the next frontier; all if ``None``.
        """
        self._before, logits = self.heads.draft_step(
            self._frontier,
            self.state,
            depth=self._depth,
            before=self._before,
            parents=self._drafted_from,
            embed=self.embed,
            unembed=self.unembed,
        )
        ranking, log_probs = self.guess(logits, self._depth)
        count = self._frontier.shape[1]
        children = ranking.topk(width, dim=-1).indices.expand(-1, count, -1)
        gained = log_probs.expand(-1, count, -1).gather(2, children)
        scores = self._score()[:, :, None] + gained - 1e-6  # a parent always scores above its children
        parents = self._places[:, :, None].expand_as(children)
        first = sum(part.shape[1] for part in self.tokens)
        self.tokens.append(children.flatten(1))
        self.parents.append(parents.flatten(1))
        self.scores.append(scores.flatten(1))
        self._depth += 1
        chosen = torch.arange(count * width, device=children.device).expand(len(children), -1)
        if keep is not None and keep < count * width:
            chosen = self.scores[-1].topk(keep, dim=1).indices.sort(dim=1).values
        self._frontier = self.tokens[-1].gather(1, chosen)
        self._places, self._drafted_from = first + chosen, chosen // width

    def _score(self) -> Float[Tensor, "B N"]:
        return torch.cat(self.scores, dim=1).gather(1, self._places)

    def tree(self, max_nodes: int | None = None) -> Tree:
        """Return what has grown."""
        tokens, parents = torch.cat(self.tokens, dim=1), torch.cat(self.parents, dim=1)
        if max_nodes is None or max_nodes + 1 >= tokens.shape[1]:
            return Tree(tokens, parents)
        kept = torch.cat(self.scores, dim=1).topk(max_nodes + 1, dim=1).indices.sort(dim=1).values
        moved = torch.zeros_like(tokens).scatter_(
            1, kept, torch.arange(max_nodes + 1, device=kept.device).expand_as(kept)
        )
        old = parents.gather(1, kept)
        return Tree(tokens.gather(1, kept), torch.where(old < 0, -1, moved.gather(1, old.clamp(min=0))))


class DraftTree(Component, ABC):
    """The shape of a tree of drafts.

    Attributes:
        depth: Drafts one after the other.
        nodes: Most drafts of a round.
        widest: Most children of a token.
    """

    depth: int
    nodes: int
    widest: int

    @abstractmethod
    def grow(self, grower: Grower, depth: int) -> Tree:
        """Return the tree of a round, of so many levels; at most ``depth`` of the shape."""


class StaticTree(DraftTree):
    """Give every token of a depth the same number of children: the most likely ones.

    Cai et al. 2024 (arXiv 2401.10774), section 2.3.2.

    Args:
        widths: Number of children at each depth.

    Raises:
        ValueError: If a width is below 1, or there is none.

    Example:
        >>> StaticTree(widths=[3, 2, 1]).nodes
        15
    """

    def __init__(self, *, widths: Sequence[int]) -> None:
        if len(widths) == 0:
            refuse(self, "widths is empty; give the number of children at each depth.")
        widths = [whole(self, f"widths[{index}]", width, 1) for index, width in enumerate(widths)]
        self.widths, self.depth, self.widest, self.nodes, count = widths, len(widths), max(widths), 0, 1
        for width in widths:
            count *= width
            self.nodes += count

    def grow(self, grower: Grower, depth: int) -> Tree:
        """Return the tree of a round."""
        for width in self.widths[:depth]:
            grower.grow(width)
        return grower.tree()


class DynamicTree(DraftTree):
    """Grow the most confident paths, and verify the most confident tokens under a budget.

    Confidence is the product of the drafter's own probabilities along the path. Li et al. 2024 (arXiv 2406.16858).

    Args:
        depth: Drafts one after the other.
        width: Children of a token, and tokens of a depth that get children.
        nodes: Most drafts that are verified.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, *, depth: int, width: int = 4, nodes: int = 16) -> None:
        self.depth, self.width = whole(self, "depth", depth, 1), whole(self, "width", width, 1)
        self.widest, self.nodes = self.width, whole(self, "nodes", nodes, 1)

    def grow(self, grower: Grower, depth: int) -> Tree:
        """Return the tree of a round."""
        for _ in range(depth):
            grower.grow(self.width, keep=self.width)
        return grower.tree(max_nodes=self.nodes)


class TreeDrafter(Drafter):
    """Let the model's heads draft a tree, verified by the model's own choices."""

    uses_heads = True

    def __init__(self, *, tree: DraftTree) -> None:
        self.tree = tree

    def limits(self, heads: Heads) -> tuple[int, int | None]:
        """Return the tree's depth."""
        return self.tree.depth, heads.max_drafts

    def chunk_size(self, num_drafts: int) -> int:
        """Return how many nodes the tree has, or levels if these are more: the cache has room for a whole path."""
        return max(self.tree.nodes, self.tree.depth)

    def check(self, trunk: Trunk, heads: Heads) -> None:
        """Refuse a tree that is deeper than the heads, wider than the vocabulary, or that the trunk cannot read."""
        heads.check_num_drafts(self.tree.depth)
        if self.tree.widest > trunk.vocab_size:
            refuse(
                self.tree,
                f"a token gets {self.tree.widest} children, but the vocabulary has only {trunk.vocab_size} tokens; "
                "make the tree narrower.",
            )
        if not trunk.supports_trees:
            refuse(self.tree, f"{type(trunk).__name__} cannot read a tree of drafts; leave tree out.")

    def draft(self, context: DraftingContext) -> Draft:
        """Grow as many levels as are asked for."""
        sampler, depth = context.sampler, context.num_drafts

        def guess(logits: Tensor, depth: int) -> Guess:
            if sampler is None:
                return Guess(logits, logits.double().log_softmax(dim=-1))
            log_probs = sampler.probs(logits).log()
            return Guess(log_probs + sampler.noise.gumbels()[:, depth : depth + 1], log_probs)

        grower = Grower(context.heads, context.heads_state, context.token, context.embed, context.unembed, guess)
        grown = self.tree.grow(grower, depth)
        counts = context.limits.clamp(max=depth)
        return Draft(grown.tokens[:, 1:], counts=counts, parents=grown.parents[:, 1:], depth=depth)
