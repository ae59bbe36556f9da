"""Windows of a token stream: a map-style data set, and batches for the loaders."""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtp_modules.core.checks import refuse, whole
from mtp_modules.data.rows import IntArray, TokenRows
from mtp_modules.data.streams import TokenStream


class WindowDataset(TokenRows, Dataset[dict[str, Tensor]]):
    """Split a token stream into rows of ``window + lookahead`` tokens, one every ``window`` tokens.

    Neighbouring rows share ``lookahead`` tokens: targets of the first row's last positions, and inputs of the second. A
    row's id is its start in the stream. As a data set, item ``i`` is the ``i``-th row from the beginning.

    Args:
        stream: Concatenated documents.
        window: Positions ``T`` that the trunk reads.
        lookahead: The largest horizon.
        name: Name of the stream in error messages.
        random_offsets: Tile the stream from a new random offset in every epoch.

    Raises:
        ValueError: If the stream is shorter than one row, or a size is invalid.
    """

    def __init__(
        self, *, stream: TokenStream, window: int, lookahead: int, name: str = "text", random_offsets: bool = True
    ) -> None:
        check_window(self, window, lookahead)
        self.stream = stream
        self.window = window
        self.lookahead = lookahead
        slack = len(stream.tokens) - (window + lookahead)
        if slack < 0:
            refuse(
                self,
                f"the {name} has {len(stream.tokens)} tokens, a row needs window + lookahead = {window} + {lookahead}; "
                "give more text or a smaller window.",
            )
        self.num_rows = max(1, (slack + 1) // window)
        self._last_phase = min(window - 1, slack - (self.num_rows - 1) * window) if random_offsets else 0

    def __len__(self) -> int:
        return len(self.fixed_ids())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``tokens``, ``document_ids`` and, if the stream has one, ``loss_mask``: ``(window + lookahead,)``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: values[0] for name, values in self._rows(np.array([index * self.window])).items()}

    def epoch_ids(self, generator: np.random.Generator) -> IntArray:
        """Tile the stream from a random offset, and shuffle; every offset is equally likely."""
        phase = int(generator.integers(self._last_phase + 1))
        return phase + self.window * generator.permutation(self.num_rows)

    def fixed_ids(self) -> IntArray:
        """Tile the stream from its beginning."""
        return np.arange(0, len(self.stream.tokens) - (self.window + self.lookahead) + 1, self.window, dtype=np.int64)

    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return ``tokens``, ``loss_mask`` if the stream has one, ``document_ids`` if a row holds several documents.

        Most rows hold one document, and attention is faster without a mask.

        Args:
            ids: Where the rows start, ``(B,)``.

        Shape:
            each ``(B, window + lookahead)``.
        """
        rows = self._rows(ids)
        if (rows["document_ids"][:, 0] == rows["document_ids"][:, -1]).all():
            del rows["document_ids"]
        return rows

    def digest(self) -> str:
        """Return a hash of the text and the sizes."""
        text = f"{self.stream.digest()} {self.window} {self.lookahead} {self._last_phase}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _rows(self, starts: IntArray) -> dict[str, Tensor]:
        places = starts[:, None] + np.arange(self.window + self.lookahead)
        documents = np.searchsorted(self.stream.document_starts, places, side="right") - 1
        rows = {"tokens": self.stream.tokens[places].astype(np.int64), "document_ids": documents}
        if self.stream.loss_mask is not None:
            rows["loss_mask"] = self.stream.loss_mask[places]
        return {name: torch.from_numpy(values) for name, values in rows.items()}


def check_window(owner: object, window: int, lookahead: int) -> None:
    """Reject sizes that leave nothing to learn.

    Raises:
        ValueError: If a size is below 1, or the largest horizon is not below the window.
    """
    whole(owner, "window", window, 1)
    whole(owner, "lookahead", lookahead, 1)
    if lookahead >= window:
        refuse(
            owner,
            f"the largest horizon must be below the window, got lookahead {lookahead} and window {window}; "
            "take a longer window or fewer horizons.",
        )
