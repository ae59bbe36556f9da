"""Synthetic tasks with answers: rows that are sampled by a rule, with a mask of the tokens that are answers."""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.component import Component, describe
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.corpus import SPLITS
from mtp_modules.data.module import TokenDataModule
from mtp_modules.data.rows import IntArray, TokenRows

HELD_OUT = 1 / 8
"""Share of all prompts for validation, and for testing."""


class Example(NamedTuple):
    """One row.

    Attributes:
        tokens: Token ids.
        answer: Which of them are the answer; they follow from the tokens before them.
    """

    tokens: list[int]
    answer: list[bool]


class Task(Component, ABC):
    """Samples examples. The prompt of an example consists of the tokens that are not answers.

    Attributes:
        tokenizer: Turns examples into text and back.
        blank: A placeholder token: padding, pauses, and answers that the model must not read.
        answers_only: Whether only answers are targets. False where the rest of a row is learned too, as in text.
    """

    tokenizer: Tokenizer
    blank: int
    answers_only: bool = True

    @abstractmethod
    def sample(self, generator: np.random.Generator, split: str) -> Example:
        """Sample an example.

        Args:
            generator: The only source of randomness.
            split: ``train``, ``val`` or ``test``.
        """

    @property
    @abstractmethod
    def longest(self) -> int:
        """Most tokens of an example."""


def split_of_example(example: Example) -> str:
    """Return the split of an example: a pure function of its prompt, so that no two splits share one.

    Args:
        example: Of any task.
    """
    prompt = np.array(example.tokens, dtype=np.int64)[~np.array(example.answer)]
    digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "test" if place < HELD_OUT else "val" if place < 2 * HELD_OUT else "train"


class TaskRows(TokenRows):
    """Rows of a task, sampled lazily: row ``i`` is a pure function of the seed and ``i``.

    Held-out rows are cached, because they are read repeatedly, and most samples belong to the training split.

    Args:
        task: Samples examples.
        split: ``train``, ``val`` or ``test``.
        num_rows: How many.
        lookahead: The largest horizon; every answer lies within reach of horizon 1.
        seed: Another seed samples other rows.
        teacherless: Let the model read blanks instead of answers.
    """

    def __init__(
        self, *, task: Task, split: str, num_rows: int, lookahead: int, seed: int, teacherless: bool = False
    ) -> None:
        self.task, self.split, self.num_rows, self.seed, self.teacherless = task, split, num_rows, seed, teacherless
        self.lookahead, self.row_length = lookahead, task.longest + lookahead - 1
        self._kept: dict[int, Example] = {}

    def example(self, index: int) -> Example:
        """Return row ``index`` without padding.

        Args:
            index: Number of the row, from 0.
        """
        if index in self._kept:
            return self._kept[index]
        generator = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        for _ in range(10_000):
            example = self.task.sample(generator, self.split)
            if split_of_example(example) == self.split:
                if self.split != "train":
                    self._kept[index] = example
                return example
        refuse(
            self.task,
            f"10000 samples gave no prompt of the {self.split} split; there are too few different prompts, "
            "so make the task larger.",
        )

    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return ``tokens``, ``answer_mask`` and ``loss_mask``, and ``inputs`` where answers must not be read.

        Args:
            ids: Numbers of rows, ``(B,)``.

        Shape:
            ``answer_mask (B, longest - 1)``, the others ``(B, longest + lookahead - 1)``.
        """
        tokens = np.full((len(ids), self.row_length), self.task.blank, dtype=np.int64)
        answer = np.zeros(tokens.shape, dtype=bool)
        filled = np.zeros(tokens.shape, dtype=bool)
        for row, index in enumerate(ids.tolist()):
            example = self.example(index)
            length = len(example.tokens)
            tokens[row, :length], answer[row, :length], filled[row, :length] = *example, True
        learned = answer.copy() if self.task.answers_only else filled
        asked = answer[:, 1 : self.row_length - self.lookahead + 1]  # aligned with the targets of horizon 1
        batch = {"tokens": tokens, "answer_mask": asked, "loss_mask": learned}
        if self.teacherless:
            batch["inputs"] = np.where(answer, self.task.blank, tokens)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def digest(self) -> str:
        """Return a hash of everything that determines the rows."""
        rule = [describe(self.task), self.split, self.num_rows, self.row_length, self.seed, self.teacherless]
        return hashlib.blake2b(json.dumps(rule).encode(), digest_size=16).hexdigest()


class TaskDataModule(TokenDataModule):
    """Rows of a task, split by their prompts: no prompt of one split is ever sampled for another.

    Rows are generated when they are read, from the seed and their number alone, so ``num_train`` may cover the whole
    run without repetition. They are padded to equal length, and padding never counts.

    Batches carry ``answer_mask``, true at every position whose next token is part of an answer. Greedy decoding returns
    the right answer if and only if horizon 1's argmax is right at all of them, given the right tokens before.

    Args:
        task: Samples the rows.
        batch_size: Rows of a batch of one process.
        lookahead: The largest horizon.
        num_train: Rows to train on.
        num_val: Rows to validate on.
        num_test: Rows to test on.
        teacherless: Let the model read blanks instead of answers, in training and evaluation, so that horizon 1 must
            predict the whole answer at once. Bachmann & Nagarajan 2024 (arXiv 2403.06963), section 5.
        augmentation: Changes training rows; none if ``None``.
        seed: Another seed samples other rows in another order.
        num_workers: Worker processes that sample rows; one or more pay off where a step takes only milliseconds.

    Shape:
        ``tokens``, ``loss_mask`` and, if teacherless, ``inputs``: ``(B, longest + lookahead - 1)``;
        ``answer_mask (B, longest - 1)``, as long as what the trunk reads.

    Raises:
        ValueError: If a size is below 1, ``teacherless`` is set for a task that is learned whole, or the augmentation
            would separate answers from their prompts.
    """

    def __init__(
        self,
        *,
        task: Task,
        batch_size: int,
        lookahead: int,
        num_train: int = 100_000,
        num_val: int = 1000,
        num_test: int = 1000,
        teacherless: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, max_eval_rows=None, augmentation=augmentation
        )
        sizes = {"lookahead": lookahead, "num_train": num_train, "num_val": num_val, "num_test": num_test}
        for name, value in sizes.items():
            whole(self, name, value, 1)
        if teacherless and not task.answers_only:
            refuse(
                self,
                f"teacherless needs a task whose answers alone are learned, {type(task).__name__} is learned whole; "
                "leave it out.",
            )
        if augmentation is not None and augmentation.moves_tokens:
            refuse(
                self,
                f"{type(augmentation).__name__} moves tokens, which would separate answers from their prompts; "
                "take TokenDropout, or leave augmentation out.",
            )
        self.task, self.lookahead, self.teacherless = task, lookahead, teacherless
        self.num_train, self.num_val, self.num_test = num_train, num_val, num_test
        self.tokenizer = task.tokenizer
        self._rows: dict[str, TaskRows] = {}

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    def rows(self, split: str) -> TaskRows:
        """Return the rows of a split.

        Args:
            split: ``train``, ``val`` or ``test``.
        """
        if split not in SPLITS:
            refuse(self, f"there is no split {split!r}; the splits are {', '.join(SPLITS)}.")
        if split not in self._rows:
            self._rows[split] = TaskRows(
                task=self.task,
                split=split,
                num_rows={"train": self.num_train, "val": self.num_val, "test": self.num_test}[split],
                lookahead=self.lookahead,
                seed=self.seed,
                teacherless=self.teacherless,
            )
        return self._rows[split]
