"""Augmentation: random changes to training rows in every epoch, against overfitting on little data."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from mtp_modules.core.checks import at_least, fraction
from mtp_modules.core.component import Component
from mtp_modules.data.rows import IntArray


class Augmentation(Component, ABC):
    """Changes rows of training batches; evaluation does not use it.

    The change of a row is a pure function of (seed, epoch, place in the epoch), so it does not depend on a resume, on
    the batch size or on the number of processes.

    Attributes:
        moves_tokens: Whether tokens change places, which breaks rows with a question and an answer.
    """

    moves_tokens: bool = False

    @abstractmethod
    def row(self, row: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
        """Return a changed row. The given one must not be modified.

        Args:
            row: ``tokens (L,)`` and the other tensors of the batch, of the same shape; ``inputs`` holds the tokens that
                the model reads, where those are not ``tokens``.
            generator: The only source of randomness.
        """

    def __call__(self, batch: dict[str, Tensor], *, seed: int, epoch: int, places: IntArray) -> dict[str, Tensor]:
        """Return a changed batch.

        Args:
            batch: Tensors ``(B, L)``.
            seed: Of the data module.
            epoch: Counted from 0.
            places: Of the rows in their epoch, ``(B,)``.
        """
        rows = []
        for index, place in enumerate(places.tolist()):
            # The third number sets this stream apart from the one that orders the epoch.
            generator = np.random.default_rng([seed, epoch, 1, place])
            rows.append(self.row({name: values[index] for name, values in batch.items()}, generator))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class TokenDropout(Augmentation):
    """Replace some input tokens by random ones; the targets do not change.

    Each token is replaced with probability ``share`` by the token at a random place of the same row, a sample from the
    row's unigram distribution: the unigram noise of Xie et al. 2017 (arXiv 1703.02573), on the inputs alone. Chen et
    al. 2026 (arXiv 2606.16246) find random replacement the best of several augmentations for many epochs on few data.

    Args:
        share: Probability that a token is replaced.

    Shape:
        adds ``inputs``, as ``tokens``.

    Raises:
        ValueError: If ``share`` lies outside [0, 1].

    Example:
        >>> row = TokenDropout(share=0.5).row({"tokens": torch.arange(8)}, np.random.default_rng(0))
        >>> row["tokens"].tolist(), row["inputs"].tolist()
        ([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 4, 7, 4, 5, 6, 7])
    """

    def __init__(self, *, share: float = 0.1) -> None:
        fraction(self, "share", share)
        self.share = share

    def row(self, row: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
        """Add ``inputs``, with some tokens replaced."""
        read = row.get("inputs", row["tokens"])
        length = len(read)
        replaced = torch.from_numpy(generator.random(length) < self.share)
        others = torch.from_numpy(generator.integers(length, size=length))
        return {**row, "inputs": torch.where(replaced, read[others], read)}


class SpanShuffle(Augmentation):
    """Split every document of a row into spans and shuffle them, in a share of the rows.

    The first token of a span that follows a different span than before is masked, because it cannot be predicted. Lewis
    et al. 2019 (arXiv 1910.13461), section 2.2, shuffle sentences; spans need no full stops.

    Args:
        mean_length: Mean number of tokens of a span; lengths are geometrically distributed.
        share: Probability that a row is shuffled.

    Shape:
        adds ``loss_mask``, as ``tokens``.

    Raises:
        ValueError: If ``mean_length`` is below 1, or ``share`` lies outside [0, 1].

    Example:
        >>> row = SpanShuffle(mean_length=3, share=1.0).row({"tokens": torch.arange(10)}, np.random.default_rng(4))
        >>> row["tokens"].tolist()
        [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
        >>> row["tokens"][row["loss_mask"]].tolist()
        [6, 7, 8, 9, 1, 2, 3, 4, 5]
    """

    moves_tokens = True

    def __init__(self, *, mean_length: float = 16.0, share: float = 0.5) -> None:
        at_least(self, "mean_length", mean_length, 1)
        fraction(self, "share", share)
        self.mean_length, self.share = mean_length, share

    def row(self, row: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
        """Shuffle all tensors of the row alike, and mask the targets that cannot be predicted."""
        length = len(row["tokens"])
        learned = row.get("loss_mask", torch.ones(length, dtype=torch.bool))
        if generator.random() >= self.share:
            return {**row, "loss_mask": learned}
        cuts = generator.random(length) < 1 / self.mean_length
        documents = row.get("document_ids", torch.zeros(length, dtype=torch.long)).numpy()
        starts = np.flatnonzero(np.append(True, documents[1:] != documents[:-1]))
        order = [
            place
            for document in np.split(np.arange(length), starts[1:])
            for span in _shuffled(np.split(document, np.flatnonzero(cuts[document[1:]]) + 1), generator)
            for place in span.tolist()
        ]
        places = torch.tensor(order)
        moved = {name: values[places] for name, values in row.items()}
        follows = torch.ones(length, dtype=torch.bool)
        follows[1:] = places[1:] == places[:-1] + 1
        follows |= torch.from_numpy(np.isin(np.arange(length), starts))
        return {**moved, "loss_mask": learned[places] & follows}


def _shuffled(spans: list[IntArray], generator: np.random.Generator) -> list[IntArray]:
    return [spans[index] for index in generator.permutation(len(spans))]
