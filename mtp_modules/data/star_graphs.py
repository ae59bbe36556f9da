"""Path finding in a star graph, where next-token training fails: Bachmann & Nagarajan 2024 (arXiv 2403.06963)."""

from itertools import pairwise

import numpy as np

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.data.tasks import Example, Task
from mtp_modules.data.tokenizers import WordTokenizer


class StarGraphTask(Task):
    """Find the path from the middle of a star to the end of one of its arms.

    The graph G(d, l) has ``d`` arms that leave a start node, each with ``l`` nodes, the start included. A row lists the
    edges in random order, then start and goal, then the path: ``u v | u v | ... / start goal = start ... goal``. Names
    of nodes are sampled for every row. Bachmann & Nagarajan 2024 (arXiv 2403.06963), section 4.

    Only the node after the start is hard: it needs the whole path, while each later node follows from the one before
    and an edge. With teacher forcing, a model learns the easy nodes and guesses the hard one, so it is right once in
    ``d``. In reverse, from the goal, every step follows from one edge of the prompt.

    Args:
        num_arms: Paths ``d`` that leave the start.
        path_length: Nodes ``l`` of a path, start and goal included.
        num_nodes: Names to sample nodes from.
        reverse: Ask for the path from the goal to the start.

    Raises:
        ValueError: If a number is too small, or there are fewer names than nodes.

    Example:
        >>> task = StarGraphTask(num_arms=2, path_length=3, num_nodes=9)
        >>> example = task.sample(np.random.default_rng(0), "train")
        >>> task.tokenizer.decode(example.tokens)
        '4 5 | 4 6 | 5 2 | 6 3 / 4 3 = 4 6 3'
    """

    def __init__(self, *, num_arms: int = 5, path_length: int = 5, num_nodes: int = 50, reverse: bool = False) -> None:
        at_least(self, "num_arms", num_arms, 2)
        at_least(self, "path_length", path_length, 2)
        needed = 1 + num_arms * (path_length - 1)
        if num_nodes < needed:
            refuse(
                self,
                f"num_nodes must be at least {needed} for {num_arms} arms of {path_length} nodes, got {num_nodes}; "
                "take more names, or a smaller graph.",
            )
        self.num_arms, self.path_length, self.num_nodes, self.reverse = num_arms, path_length, num_nodes, reverse
        self.tokenizer = WordTokenizer(words=[*map(str, range(num_nodes)), "|", "/", "=", "_"])
        self.bar, self.slash, self.equals, self.blank = range(num_nodes, num_nodes + 4)

    @property
    def longest(self) -> int:
        """Tokens of a row; all are equally long."""
        return 3 * self.num_arms * (self.path_length - 1) + 3 + self.path_length

    def sample(self, generator: np.random.Generator, split: str) -> Example:
        """Sample a graph and a goal."""
        steps = self.path_length - 1
        start, *others = generator.permutation(self.num_nodes)[: 1 + self.num_arms * steps].tolist()
        arms = [[start, *others[arm * steps : (arm + 1) * steps]] for arm in range(self.num_arms)]
        edges = [pair for arm in arms for pair in pairwise(arm)]
        prompt = [token for place in generator.permutation(len(edges)) for token in (*edges[place], self.bar)]
        path = arms[int(generator.integers(self.num_arms))]
        prompt[-1] = self.slash
        prompt += [start, path[-1], self.equals]
        answer = path[::-1] if self.reverse else path
        return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))
