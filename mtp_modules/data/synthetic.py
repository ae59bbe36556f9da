"""Arithmetic progressions: a task that is learned in seconds and whose best possible result is known exactly."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.corpus import SPLITS
from mtp_modules.data.module import TokenDataModule
from mtp_modules.data.rows import IntArray, TokenRows


def num_starts(*, vocab_size: int, row_length: int, step: int) -> int:
    """Return how many starts keep a progression inside the vocabulary; they are ``0 .. num_starts - 1``.

    Args:
        vocab_size: Number ``V`` of token ids.
        row_length: Tokens of a row.
        step: From one token to the next.

    Raises:
        ValueError: If there is none.
    """
    last = step * (row_length - 1)
    if last >= vocab_size:
        refuse(
            "ProgressionDataModule",
            f"{row_length} tokens at step {step} end at {last} or higher, outside the vocabulary 0..{vocab_size - 1}; "
            "take a shorter length, a smaller lookahead or step, or a larger vocab_size.",
        )
    return vocab_size - last


class ProgressionCeiling(NamedTuple):
    """The best that any predictor can reach, one number a horizon, averaged over all positions of a row.

    Attributes:
        accuracy: Highest expected share of targets that are predicted right.
        nll: Lowest expected negative log-likelihood of a target, in nats.
    """

    accuracy: list[float]
    nll: list[float]


def progression_ceiling(
    *, vocab_size: int, length: int, steps: Sequence[int], horizons: Sequence[int], lookahead: int
) -> ProgressionCeiling:
    r"""Return the ceiling of the task that :class:`ProgressionDataModule` draws from.

    From the second position on the step is known, and so is every target. At the first position a predictor knows the
    start :math:`s` only, and the step with probability

    .. math:: p(d \mid s) \propto \#\{\text{times } d \text{ is listed}\} \cdot [s < n_d] / n_d,

    where :math:`n_d` starts fit step :math:`d`: a start that fits no other step gives the step away. Different steps
    lead to different targets, at every horizon, so the ceiling is the same for all of them.

    Args:
        vocab_size: Number ``V`` of token ids.
        length: Positions ``T`` that the trunk reads.
        steps: Equally likely steps.
        horizons: Offsets of the heads.
        lookahead: The largest horizon that rows have tokens for.

    Raises:
        ValueError: If a row does not fit into the vocabulary, or a horizon lies beyond ``lookahead``.

    Example:
        >>> ceiling = progression_ceiling(vocab_size=50, length=20, steps=[1, 2], horizons=[1, 2, 3], lookahead=3)
        >>> [round(accuracy, 4) for accuracy in ceiling.accuracy]
        [0.9946, 0.9946, 0.9946]
    """
    _check_steps(steps)
    if not horizons or min(horizons) < 1 or max(horizons) > lookahead:
        refuse("progression_ceiling", f"horizons must lie in 1..lookahead ({lookahead}), got {list(horizons)}.")
    row_length = length + lookahead
    joint: dict[int, list[float]] = {}
    for step, times in Counter(steps).items():
        starts = num_starts(vocab_size=vocab_size, row_length=row_length, step=step)
        for start in range(starts):
            joint.setdefault(start, []).append(times / len(steps) / starts)
    accuracy = sum(max(laws) for laws in joint.values())
    nll = sum(-law * math.log(law / sum(laws)) for laws in joint.values() for law in laws)
    return ProgressionCeiling(
        accuracy=[(length - 1 + accuracy) / length] * len(horizons), nll=[nll / length] * len(horizons)
    )


class ProgressionRows(TokenRows):
    """Rows ``start, start + step, start + 2 step, ...``, drawn once.

    Args:
        num_rows: How many.
        row_length: Tokens of each.
        vocab_size: Number ``V`` of token ids.
        steps: Equally likely steps; the start is then uniform among those that keep the row inside the vocabulary.
        seed: Another seed draws other rows.
    """

    def __init__(
        self, *, num_rows: int, row_length: int, vocab_size: int, steps: Sequence[int], seed: Sequence[int]
    ) -> None:
        generator = np.random.default_rng(list(seed))
        limits = [num_starts(vocab_size=vocab_size, row_length=row_length, step=step) for step in steps]
        chosen = generator.integers(len(steps), size=num_rows)
        starts = generator.integers(np.array(limits)[chosen]).astype(np.int64)
        self.num_rows = num_rows
        self.tokens: IntArray = starts[:, None] + np.array(steps, dtype=np.int64)[chosen, None] * np.arange(row_length)

    def epoch_ids(self, generator: np.random.Generator) -> IntArray:
        """Shuffle all rows."""
        return generator.permutation(self.num_rows)

    def fixed_ids(self) -> IntArray:
        """Return all rows in the order they were drawn in."""
        return np.arange(self.num_rows)

    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return ``tokens``, ``(B, row_length)``.

        Args:
            ids: Numbers of rows, ``(B,)``.
        """
        return {"tokens": torch.from_numpy(self.tokens[ids])}

    def digest(self) -> str:
        """Return a hash of all rows."""
        return hashlib.blake2b(self.tokens.data, digest_size=16).hexdigest()


class ProgressionDataModule(TokenDataModule):
    """Arithmetic progressions: the step is drawn from ``steps``, then the start from those that fit the vocabulary.

    There are few different progressions, and all sides are drawn from all of them: this tests that training works, not
    that it generalises. :func:`progression_ceiling` says what the best possible model reaches.

    Args:
        batch_size: Rows of a batch of one process.
        lookahead: The largest horizon; a row holds ``length + lookahead`` tokens.
        vocab_size: Number ``V`` of token ids.
        length: Positions ``T`` that the trunk reads.
        steps: Equally likely steps, ``[1, 2]`` if ``None``.
        num_train: Rows to train on.
        num_val: Rows to validate on.
        num_test: Rows to test on.
        augmentation: Changes training rows; none if ``None``.
        seed: Another seed draws other rows in another order.
        num_workers: Worker processes that prepare batches.

    Shape:
        ``tokens (B, length + lookahead)``.

    Raises:
        ValueError: If a row does not fit into the vocabulary, or a size is below 1.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        lookahead: int,
        vocab_size: int = 50,
        length: int = 20,
        steps: list[int] | None = None,
        num_train: int = 2000,
        num_val: int = 500,
        num_test: int = 500,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, max_eval_rows=None, augmentation=augmentation
        )
        self.steps = [1, 2] if steps is None else steps
        sizes = {"lookahead": lookahead, "length": length, "vocab_size": vocab_size}
        counts = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        for name, value in {**sizes, **counts}.items():
            at_least(self, name, value, 1)
        _check_steps(self.steps)
        for step in self.steps:
            num_starts(vocab_size=vocab_size, row_length=length + lookahead, step=step)
        self._vocab_size = vocab_size
        self.length = length
        self.lookahead = lookahead
        self.num_train = num_train
        self.num_val = num_val
        self.num_test = num_test
        self._rows: dict[str, ProgressionRows] = {}

    @property
    def vocab_size(self) -> int:
        """Number ``V`` of token ids."""
        return self._vocab_size

    def ceiling(self, horizons: Sequence[int]) -> ProgressionCeiling:
        """Return the best that any predictor can reach on this task.

        Args:
            horizons: Offsets of the heads.
        """
        return progression_ceiling(
            vocab_size=self.vocab_size,
            length=self.length,
            steps=self.steps,
            horizons=horizons,
            lookahead=self.lookahead,
        )

    def rows(self, split: str) -> ProgressionRows:
        """Return the rows of a side.

        Args:
            split: ``train``, ``val`` or ``test``.
        """
        if split not in SPLITS:
            refuse(self, f"there is no split {split!r}; the splits are {', '.join(SPLITS)}.")
        if split not in self._rows:
            self._rows[split] = ProgressionRows(
                num_rows={"train": self.num_train, "val": self.num_val, "test": self.num_test}[split],
                row_length=self.length + self.lookahead,
                vocab_size=self.vocab_size,
                steps=self.steps,
                seed=(self.seed, SPLITS.index(split)),
            )
        return self._rows[split]


def _check_steps(steps: Sequence[int]) -> None:
    if not steps or min(steps) < 1:
        refuse("ProgressionDataModule", f"steps must be a list of numbers of at least 1, got {list(steps)}.")
