"""Children's stories about people whose names must be remembered, after Gloeckle et al. 2024 (arXiv 2404.19737)."""

import numpy as np

from mtp_modules.core.checks import at_least, fraction
from mtp_modules.data.story_grammar import FIRST_NAMES, LAST_NAMES, PEOPLE, tell, vocabulary
from mtp_modules.data.tasks import Example, Task
from mtp_modules.data.tokenizers import WordTokenizer

SHORTEST = 100
"""Tokens that suffice for about a quarter of all stories; 128 suffice for nearly all."""


class StoryTask(Task):
    """Generate a story in which names must be remembered.

    Each person has a first and a last name, two tokens, which are paired for one story only. Answers are the last names
    at every mention of a person after the first: the model must copy the last name that followed the first name before,
    which is induction in the sense of Olsson et al. 2022 (arXiv 2209.11895). Gloeckle et al. 2024 (arXiv 2404.19737),
    section 4.1, measure it on another corpus; ours comes from :mod:`~mtp_modules.data.story_grammar`.

    The paper's models train on stories with ordinary names, and see random pairs only in the test. A lower
    ``random_names`` is closer to that: in the other training stories, every first name has a fixed last name.

    Args:
        random_names: Share of training stories whose names are paired at random; in held-out stories all are.
        max_length: Longest story in tokens; longer ones are rejected.

    Raises:
        ValueError: If ``random_names`` lies outside [0, 1], or ``max_length`` leaves too few stories.

    Example:
        >>> task = StoryTask()
        >>> example = task.sample(np.random.default_rng(0), "train")
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

    def sample(self, generator: np.random.Generator, split: str) -> Example:
        """Sample a story of at most ``max_length`` tokens."""
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
