"""Arithmetic progressions: a task that is learned in seconds, with an exactly known best possible result."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_modules.core.checks import fraction, refuse, whole
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
    """The best possible result of any predictor, one number per horizon, averaged over all positions of a row.

    Attributes:
        accuracy: Highest expected share of targets that are predicted right.
        nll: Lowest expected negative log-likelihood of a target, in nats.
    """

    accuracy: list[float]
    nll: list[float]


def progression_ceiling(
    *, vocab_size: int, length: int, steps: Sequence[int], horizons: Sequence[int], lookahead: int
) -> ProgressionCeiling:
    r"""Return the ceiling of the task of :class:`ProgressionDataModule`.

    From the second position on the step is known, and so is every target. At the first position a predictor knows only
    the start :math:`s`, and the step has probability

    .. math:: p(d \mid s) \propto \#\{\text{times } d \text{ is listed}\} \cdot [s < n_d] / n_d,

    where :math:`n_d` starts fit step :math:`d`: a start that fits no other step determines the step. Different steps
    lead to different targets, at every horizon, so the ceiling is the same for all horizons.

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
    _check_horizons(horizons, lookahead)
    row_length = length + lookahead
    limits = [num_starts(vocab_size=vocab_size, row_length=row_length, step=step) for step in steps]
    return _ceiling([np.arange(limit) for limit in limits], steps=steps, length=length, num_horizons=len(horizons))


def _ceiling(starts: Sequence[IntArray], *, steps: Sequence[int], length: int, num_horizons: int) -> ProgressionCeiling:
    """Return the ceiling where each listed step has its own starts."""
    joint: dict[tuple[int, int], float] = {}
    for step, own in zip(steps, starts, strict=True):
        for start in own.tolist():
            joint[start, step] = joint.get((start, step), 0.0) + 1 / len(steps) / len(own)
    by_start: dict[int, list[float]] = {}
    for (start, _), prob in joint.items():
        by_start.setdefault(start, []).append(prob)
    accuracy = sum(max(probs) for probs in by_start.values())
    nll = sum(-prob * math.log(prob / sum(probs)) for probs in by_start.values() for prob in probs)
    return ProgressionCeiling(
        accuracy=[(length - 1 + accuracy) / length] * num_horizons, nll=[nll / length] * num_horizons
    )


class ProgressionRows(TokenRows):
    """Rows ``start, start + step, start + 2 step, ...``, sampled once.

    Args:
        num_rows: How many.
        row_length: Tokens of each.
        steps: Equally likely steps.
        starts: Equally likely starts of each step.
        seed: Another seed samples other rows.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        row_length: int,
        steps: Sequence[int],
        starts: Sequence[IntArray],
        seed: Sequence[int],
    ) -> None:
        generator = np.random.default_rng(list(seed))
        chosen = generator.integers(len(steps), size=num_rows)
        places = generator.integers(np.array([len(own) for own in starts])[chosen])
        first = np.array([starts[step][place] for step, place in zip(chosen, places, strict=True)], dtype=np.int64)
        self.num_rows = num_rows
        self.tokens: IntArray = first[:, None] + np.array(steps, dtype=np.int64)[chosen, None] * np.arange(row_length)

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
    """Arithmetic progressions: the step is sampled from ``steps``, then the start from those that fit the vocabulary.

    There are few different progressions, and all splits are sampled from all of them: this tests that training works,
    not that it generalises. ``held_out_share`` reserves some for validation and testing. :func:`progression_ceiling`
    returns the result of the best possible model.

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
        held_out_share: Share of the starts of every step that only validation and testing use; with 0, all splits use
            all starts.
        max_lookahead: Reserve this number of tokens ahead, so that runs with fewer horizons use the same progressions;
            ``lookahead`` if ``None``.
        seed: Another seed samples other rows in another order, and holds out other starts.
        num_workers: Worker processes that prepare batches.

    Shape:
        ``tokens (B, length + lookahead)``.

    Raises:
        ValueError: If a row does not fit into the vocabulary, a size is below 1, ``max_lookahead`` is below
            ``lookahead``, or a step has too few starts to hold some out and keep some.
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
        held_out_share: float = 0.0,
        max_lookahead: int | None = None,
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
            whole(self, name, value, 1)
        _check_steps(self.steps)
        fraction(self, "held_out_share", held_out_share)
        room = lookahead if max_lookahead is None else max_lookahead
        whole(self, "max_lookahead", room, lookahead)
        limits = [num_starts(vocab_size=vocab_size, row_length=length + room, step=step) for step in self.steps]
        self._starts = [
            _split_starts(limit, step, held_out_share, seed) for limit, step in zip(limits, self.steps, strict=True)
        ]
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
        """Return the best possible result of any predictor on the rows of validation and testing.

        Args:
            horizons: Offsets of the heads.
        """
        _check_horizons(horizons, self.lookahead)
        held_out = [starts[1] for starts in self._starts]
        return _ceiling(held_out, steps=self.steps, length=self.length, num_horizons=len(horizons))

    def rows(self, split: str) -> ProgressionRows:
        """Return the rows of a split.

        Args:
            split: ``train``, ``val`` or ``test``.
        """
        if split not in SPLITS:
            refuse(self, f"there is no split {split!r}; the splits are {', '.join(SPLITS)}.")
        if split not in self._rows:
            self._rows[split] = ProgressionRows(
                num_rows={"train": self.num_train, "val": self.num_val, "test": self.num_test}[split],
                row_length=self.length + self.lookahead,
                steps=self.steps,
                starts=[starts[split != "train"] for starts in self._starts],
                seed=(self.seed, SPLITS.index(split)),
            )
        return self._rows[split]


def _check_steps(steps: Sequence[int]) -> None:
    if not steps or min(steps) < 1:
        refuse("ProgressionDataModule", f"steps must be a list of numbers of at least 1, got {list(steps)}.")


def _split_starts(num: int, step: int, held_out_share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Return the starts for training, and those for validation and testing."""
    if held_out_share == 0.0:
        return np.arange(num), np.arange(num)
    held_out = max(1, round(num * held_out_share))
    if held_out >= num:
        refuse(
            "ProgressionDataModule",
            f"held_out_share {held_out_share} of the {num} starts of step {step} leaves none to train on; lower it, or "
            "take a larger vocab_size.",
        )
    order = np.random.default_rng([seed, step, num]).permutation(num)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _check_horizons(horizons: Sequence[int], lookahead: int) -> None:
    if not horizons or min(horizons) < 1 or max(horizons) > lookahead:
        refuse("progression_ceiling", f"horizons must lie in 1..lookahead ({lookahead}), got {list(horizons)}.")
