"""Documents of any source as training windows."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.cached_states import CachedRows, CachedStates
from mtp_modules.data.corpus import SHARED, SPLITS, check_shares, line_starts, read_streams, said_of
from mtp_modules.data.documents import DocumentSource
from mtp_modules.data.module import TokenDataModule
from mtp_modules.data.packing import PackedRows
from mtp_modules.data.progress import ProgressBar
from mtp_modules.data.prompts import pick_prompts
from mtp_modules.data.rows import TokenRows
from mtp_modules.data.shards import Progress, cached_streams
from mtp_modules.data.sources import sources_of
from mtp_modules.data.streams import TokenStream
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.data.windows import WindowDataset, check_window

_LOOKED_AT = 2**23
"""Tokens of a split among which those that end lines are found."""


class TextDataModule(TokenDataModule):
    """Train on documents: files of text, JSON lines, data sets, conversations, token files.

    Documents of ``sources`` are divided among train, validation and test by their names or, for records, contents. So
    the split of a document is the same on every machine and does not change when others are added or removed. A single
    document is cut instead: its beginning is for training, its end for testing. ``train``, ``val`` and ``test`` name
    sources of their own. Each split is one stream: every document, followed by the tokenizer's end token. Training
    reads shuffled windows, which tile the stream from a new random offset in every epoch; evaluation tiles it from the
    beginning.

    Args:
        sources: Sources to divide among the splits. A path stands for its files: a file, a folder, a glob pattern, or
            the word ``stdlib``, which is the standard library of the running Python.
        window: Positions ``T`` that the trunk reads.
        lookahead: The largest horizon; a row holds ``window + lookahead`` tokens.
        batch_size: Rows of a batch of one process.
        tokenizer: Turns text into token ids; bytes if ``None``.
        train: Sources to train on.
        val: Sources to validate on; ``sources`` then gives none.
        test: Sources to test on; ``sources`` then gives none.
        val_share: Share of ``sources`` for validation; 0 leaves the split out.
        test_share: Share of ``sources`` for testing; 0 leaves the split out.
        train_share: Share of ``sources`` for training; what the other splits leave if ``None``. With ``train``, little
            of it or 0: text of another kind to train on, and the same validation and test text as before.
        cache: Folder for tokens on disk, for text that does not fit into memory, or takes long to encode: it is read
            once, by one process, and memory-mapped by all; in memory if ``None``.
        seed: Another seed is another training order; the split does not depend on it.
        num_workers: Worker processes that prepare batches; cutting windows is cheap, 0 is usually right.
        max_eval_windows: Validate and test on at most so many windows, evenly spread.
        random_offsets: Tile from a new offset in every epoch; if false, every epoch reads the same windows.
        keep_whole: Pack whole documents into rows instead, where they leave the least room; no conversation is cut.
        augmentation: Changes training rows; none if ``None``.
        cached_states: Cache a frozen trunk's hidden states of the training windows on disk, for
            :class:`~mtp_modules.training.MTPModule`; not with ``random_offsets`` or an augmentation, which change rows.

    Shape:
        ``tokens (B, window + lookahead)``; ``document_ids`` alike, only in batches where a row holds several documents;
        ``loss_mask`` alike, where a source has one.

    Raises:
        ValueError: If a size or a share is invalid, or there is nothing to train on; in ``setup``, if the sources do
            not give usable splits.
    """

    def __init__(
        self,
        *,
        window: int,
        lookahead: int,
        batch_size: int,
        sources: list[DocumentSource | str] | None = None,
        train: list[DocumentSource | str] | None = None,
        val: list[DocumentSource | str] | None = None,
        test: list[DocumentSource | str] | None = None,
        tokenizer: Tokenizer | None = None,
        val_share: float = 0.05,
        test_share: float = 0.05,
        train_share: float | None = None,
        cache: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        max_eval_windows: int | None = None,
        random_offsets: bool = True,
        keep_whole: bool = False,
        augmentation: Augmentation | None = None,
        cached_states: CachedStates | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            max_eval_rows=max_eval_windows,
            augmentation=augmentation,
        )
        check_window(self, window, lookahead)
        check_shares(val_share, test_share, train_share)
        if max_eval_windows is not None:
            whole(self, "max_eval_windows", max_eval_windows, 1)
        if cached_states is not None and ((random_offsets and not keep_whole) or augmentation is not None):
            remedy = "leave augmentation out" if augmentation is not None else "set random_offsets to false"
            refuse(self, f"cached_states belong to one fixed set of windows; {remedy}.")
        if train is None and (sources is None or train_share == 0):
            refuse(self, "there is nothing to train on; give sources, or train.")
        given = {SHARED: sources, "train": train, "val": val, "test": test}
        self.sources = {name: part for name, part in given.items() if part is not None}
        self.cached_states = cached_states
        self.window = window
        self.lookahead = lookahead
        self.cache = cache
        self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self.val_share = val_share
        self.test_share = test_share
        self.train_share = train_share
        self.max_eval_windows = max_eval_windows
        self.random_offsets = random_offsets
        self.keep_whole = keep_whole
        self._datasets: dict[str, WindowDataset | PackedRows] | None = None
        self._cached_rows: CachedRows | None = None

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        """Build the cache, in one process of a machine, where a folder for one is given."""
        if self.cache is not None and self._datasets is None:
            with ProgressBar() as bar:
                self._streams(bar.update)

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the documents, once.

        Args:
            stage: Ignored; all splits are read together.
        """
        if self._datasets is not None:
            return
        self._datasets = {split: self._rows_of(split, stream) for split, stream in self._streams().items()}

    def _rows_of(self, split: str, stream: TokenStream) -> WindowDataset | PackedRows:
        name = f"text of the {split} split"
        if self.keep_whole:
            return PackedRows(stream=stream, window=self.window, lookahead=self.lookahead, name=name)
        return WindowDataset(
            stream=stream,
            window=self.window,
            lookahead=self.lookahead,
            name=name,
            random_offsets=self.random_offsets,
        )

    def _streams(self, progress: Progress | None = None) -> Mapping[str, TokenStream]:
        sources = {name: sources_of(self, part) for name, part in self.sources.items()}
        shares = {"val_share": self.val_share, "test_share": self.test_share}
        if self.cache is None:
            streams = read_streams(sources, self.tokenizer, train_share=self.train_share, **shares)
        else:
            folder = Path(self.cache)
            streams = cached_streams(
                folder, sources, self.tokenizer, progress=progress, train_share=self.train_share, **shares
            )
        if progress is not None:
            return streams
        for sentence in said_of(sources.values(), streams):
            rank_zero_info(sentence)
        if self.tokenizer.end_token is None and any(len(stream.document_starts) > 1 for stream in streams.values()):
            rank_zero_info(
                f"{type(self.tokenizer).__name__} has no end token: nothing marks the end of a document, and "
                "generation does not stop there; give the tokenizer an end_token if it has one."
            )
        return streams

    def training_rows(self) -> TokenRows:
        """Return the training windows, wrapped in :class:`CachedRows` if hidden states are cached."""
        if self.cached_states is None:
            return super().training_rows()
        if self._cached_rows is None:
            self._cached_rows = CachedRows(super().training_rows(), window=self.window, kept=self.cached_states)
        return self._cached_rows

    def rows(self, split: str) -> WindowDataset | PackedRows | None:
        """Return the windows of a split, or ``None`` if it has no source.

        Args:
            split: ``train``, ``val`` or ``test``.
        """
        if split not in SPLITS:
            refuse(self, f"there is no split {split!r}; the splits are {', '.join(SPLITS)}.")
        self.setup()
        assert self._datasets is not None
        return self._datasets.get(split)

    def prompts(self, split: str, count: int, length: int, seed: int) -> list[list[int]]:
        """Sample prompts for generation: starts of lines, each from a different file as long as there are enough.

        Args:
            split: ``val`` or ``test`` for text that the model has not seen.
            count: How many.
            length: Tokens of each.
            seed: Another seed gives other prompts.

        Raises:
            ValueError: If the split is empty, or has fewer prompts.
        """
        rows = self.rows(split)
        if rows is None:
            refuse(self, f"the {split} split is empty because {split}_share is 0; raise it to sample prompts from it.")
        end_token = self.tokenizer.end_token
        starts_line = line_starts(self.tokenizer)
        used = np.unique(rows.stream.tokens[: min(len(rows.stream.tokens), _LOOKED_AT)])
        return pick_prompts(
            rows.stream,
            count=count,
            length=length,
            seed=seed,
            line_ends=[int(token) for token in used if starts_line(int(token))],
            special=[] if end_token is None else [end_token],
        )
