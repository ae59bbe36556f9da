"""Children's stories about people whose names must be remembered, after Gloeckle et al. 2024 (arXiv 2404.19737)."""

import numpy as np

from mtp_modules.core.checks import at_least, fraction
from mtp_modules.data.story_grammar import FIRST_NAMES, LAST_NAMES, PEOPLE, tell, vocabulary
from mtp_modules.data.tasks import Example, Task
from mtp_modules.data.tokenizers import WordTokenizer

SHORTEST = 100
"""Tokens that leave room for about a quarter of all stories; 128 do for nearly all."""


class StoryTask(Task):
    """Tell a story, and remember the names in it.

    Everybody has a first and a last name, two tokens, which belong together for one story only. Answers are the last
    names, wherever somebody comes up who has come up before: first name again, last name again, which is induction in
    the sense of Olsson et al. 2022 (arXiv 2209.11895). Gloeckle et al. 2024 (arXiv 2404.19737), section 4.1, measure it
    on stories of another corpus; ours come from :mod:`~mtp_modules.data.story_grammar`.

    The paper's models learn from stories with ordinary names, and meet random pairs only in the test. Lower
    ``random_names`` towards that: in the other training stories, every first name has one last name for good.

    Args:
        random_names: Share of training stories whose names are paired at random; in held-out stories all are.
        max_length: Longest story in tokens; longer ones are not told.

    Raises:
        ValueError: If ``random_names`` lies outside [0, 1], or ``max_length`` leaves too few stories.

    Example:
        >>> task = StoryTask()
        >>> example = task.draw(np.random.default_rng(0), "train")
        >>> task.tokenizer.decode(example.tokens[:21])
        'last winter Ella Hill met Tara Nest at the farm. Ella Hill had a little silver truck. it rained'
        >>> [task.tokenizer.decode([token]) for token, asked in zip(*example) if asked][:4]
        ['Hill', 'Nest', 'Nest', 'Hill']
    """

    answers_only = False

    def __init__(self, *, random_names: float = 1.0, max_length: int = 128) -> None:
        fraction(self, "random_names", random_names)
        at_least(self, "max_length", max_length, SHORTEST)
        self.random_names, self.max_length = random_names, max_length
        self.tokenizer = WordTokenizer(words=[*vocabulary(), "_"])
        self.blank = self.tokenizer.vocab_size - 1
        self._ids = {word: index for index, word in enumerate(self.tokenizer.words)}

    @property
    def longest(self) -> int:
        """``max_length``."""
        return self.max_length

    def draw(self, generator: np.random.Generator, split: str) -> Example:
        """Tell a story."""
        while True:
            example = self._story(generator, split)
            if len(example.tokens) <= self.max_length:
                return example

    def _story(self, generator: np.random.Generator, split: str) -> Example:
        first = generator.permutation(len(FIRST_NAMES))[: len(PEOPLE)]
        if split != "train" or generator.random() < self.random_names:
            last = generator.permutation(len(LAST_NAMES))[: len(PEOPLE)]
        else:
            last = first
        names = {f"{{{person}}}": index for index, person in enumerate(PEOPLE)}
        tokens: list[int] = []
        answer: list[bool] = []
        known: set[str] = set()
        for word in tell(generator):
            if word in names:
                tokens += [int(first[names[word]]), len(FIRST_NAMES) + int(last[names[word]])]
                answer += [False, word in known]
                known.add(word)
            else:
                tokens.append(self._ids[word])
                answer.append(False)
        return Example(tokens, answer)
