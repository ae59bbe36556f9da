"""Tokens in an object store, read by ``litdata``, which is imported when data are read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.corpus import SPLITS
from mtp_modules.data.module import TokenDataModule
from mtp_modules.data.rows import IntArray, TokenRows
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.data.windows import check_window


class StreamedRows(TokenRows):
    """Rows of tokens that ``litdata.optimize`` wrote with a ``TokensLoader``, each read when it is needed.

    Rows do not overlap and lie within a chunk; the tokens at a chunk's end that do not fill a row are left out. The
    order of an epoch goes through the chunks a few at a time, in random order, and mixes their rows. As a pure function
    of the generator it resumes exactly, for any number of processes.

    Args:
        place: Folder, or address in an object store, such as ``s3://bucket/tokens``.
        window: Positions ``T`` that the trunk reads.
        lookahead: The largest horizon.
        end_token: Ends a document; each row is one document if ``None``.
        mixed_chunks: How many chunks are mixed.
        cache_dir: Folder for downloaded chunks; litdata's own if ``None``.

    Raises:
        ValueError: If ``litdata`` is missing, nothing can be read there, or there is no row.
    """

    def __init__(
        self,
        *,
        place: str,
        window: int,
        lookahead: int,
        end_token: int | None,
        mixed_chunks: int = 4,
        cache_dir: str | None = None,
    ) -> None:
        check_window(self, window, lookahead)
        self.place, self.window, self.lookahead, self.end_token = place, window, lookahead, end_token
        self.mixed_chunks, self.cache_dir = whole(self, "mixed_chunks", mixed_chunks, 1), cache_dir
        self._opened: tuple[int, Any] | None = None
        try:
            folder = Path(self._data().input_dir.path)
            self._chunks = json.loads((folder / "index.json").read_text(encoding="utf-8"))["chunks"]
            counts = [chunk["dim"] // (window + lookahead) for chunk in self._chunks]
        except ImportError:
            refuse(self, "needs the package litdata; install the extra litdata: pip install -e '.[litdata]'.")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            refuse(
                self,
                f"{place!r} holds no tokens ({error!s:.150}); write them by litdata.optimize, with TokensLoader() as "
                "item_loader.",
            )
        self._bounds = np.array([0, *counts], dtype=np.int64).cumsum()
        self.num_rows = int(self._bounds[-1])
        if not self.num_rows:
            size = window + lookahead
            refuse(self, f"{place!r} has no chunk with {size} tokens; give more text, or a smaller window.")

    def __getstate__(self) -> dict[str, Any]:
        """Return all but what a process has opened."""
        return {**vars(self), "_opened": None}

    def _data(self) -> Any:
        """Return the data set, opened once a process."""
        if self._opened is None or self._opened[0] != os.getpid():
            from litdata import StreamingDataset, TokensLoader

            loader = TokensLoader(block_size=self.window + self.lookahead)
            opened = StreamingDataset(self.place, cache_dir=self.cache_dir, item_loader=loader, shuffle=False)
            self._opened = (os.getpid(), opened)
        return self._opened[1]

    def epoch_ids(self, generator: np.random.Generator) -> IntArray:
        """Go through the chunks in random order, and shuffle the rows of a few at a time."""
        chunks = generator.permutation(len(self._chunks))
        mixed = []
        for start in range(0, len(chunks), self.mixed_chunks):
            some = chunks[start : start + self.mixed_chunks]
            mixed.append(generator.permutation(np.concatenate([self._ids(int(chunk)) for chunk in some])))
        return np.concatenate(mixed)

    def _ids(self, chunk: int) -> IntArray:
        return np.arange(self._bounds[chunk], self._bounds[chunk + 1], dtype=np.int64)

    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return ``tokens``, and ``document_ids`` if a row holds several documents.

        Args:
            ids: Numbers of rows, ``(B,)``.

        Shape:
            each ``(B, window + lookahead)``.
        """
        data = self._data()
        tokens = torch.stack([torch.as_tensor(data[number]).long() for number in ids.tolist()])
        if self.end_token is None:
            return {"tokens": tokens}
        ends = (tokens == self.end_token).long()
        documents = ends.cumsum(dim=1) - ends
        crossing = bool((documents[:, -1] > 0).any())
        return {"tokens": tokens, "document_ids": documents} if crossing else {"tokens": tokens}

    def digest(self) -> str:
        """Return a hash of the list of chunks and the sizes."""
        chunks = [[chunk["filename"], chunk["chunk_bytes"], chunk["dim"]] for chunk in self._chunks]
        rule = [chunks, self.window, self.lookahead, self.mixed_chunks]
        return hashlib.blake2b(json.dumps(rule).encode(), digest_size=16).hexdigest()


class StreamedDataModule(TokenDataModule):
    """Train on tokens in an object store, or in a folder of the same format, without a copy of all on this machine.

    Args:
        train: Folder or address of the tokens to train on.
        window: Positions ``T`` that the trunk reads.
        lookahead: The largest horizon.
        batch_size: Rows of a batch of one process.
        val: Those to validate on; none if ``None``.
        test: Those to test on; none if ``None``.
        tokenizer: Of the tokens; bytes if ``None``.
        mixed_chunks: How many chunks the order of training mixes at a time.
        cache_dir: Folder for downloaded chunks; litdata's own if ``None``.
        seed: Another seed is another order.
        num_workers: Worker processes that read rows.
        max_eval_windows: Validate and test on at most so many rows, evenly spread.
        augmentation: Changes training rows; none if ``None``.

    Shape:
        ``tokens (B, window + lookahead)``; ``document_ids`` alike, only in batches where a row holds several documents.

    Raises:
        ValueError: If a size is invalid; when rows are read, if there are none.
    """

    def __init__(
        self,
        *,
        train: str,
        window: int,
        lookahead: int,
        batch_size: int,
        val: str | None = None,
        test: str | None = None,
        tokenizer: Tokenizer | None = None,
        mixed_chunks: int = 4,
        cache_dir: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        max_eval_windows: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            max_eval_rows=max_eval_windows,
            augmentation=augmentation,
        )
        check_window(self, window, lookahead)
        self.places = {"train": train, "val": val, "test": test}
        self.window, self.lookahead, self.mixed_chunks, self.cache_dir = window, lookahead, mixed_chunks, cache_dir
        self.tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        self._rows: dict[str, StreamedRows] = {}

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    def rows(self, split: str) -> StreamedRows | None:
        """Return the rows of a split, or ``None`` if it has no place.

        Args:
            split: ``train``, ``val`` or ``test``.
        """
        if split not in SPLITS:
            refuse(self, f"there is no split {split!r}; the splits are {', '.join(SPLITS)}.")
        place = self.places[split]
        if place is not None and split not in self._rows:
            self._rows[split] = StreamedRows(
                place=place,
                window=self.window,
                lookahead=self.lookahead,
                end_token=self.tokenizer.end_token,
                mixed_chunks=self.mixed_chunks,
                cache_dir=self.cache_dir,
            )
        return self._rows.get(split)
