"""Text files as training windows."""

from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.cached_states import CachedRows, CachedStates
from mtp_modules.data.corpus import SPLITS, check_shares, load_splits
from mtp_modules.data.module import TokenDataModule
from mtp_modules.data.prompts import pick_prompts
from mtp_modules.data.rows import TokenRows
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.data.windows import WindowDataset, check_window


class TextDataModule(TokenDataModule):
    """Train on the text of files, split by file into train, validation and test.

    A file's split depends only on its path inside its source, so it is the same on every machine and does not change
    when other files are added or removed. Each split is one stream: every file, followed by the tokenizer's end token.
    Training reads shuffled windows, which tile the stream from a new random offset in every epoch; evaluation tiles it
    from the beginning.

    Args:
        sources: Files, folders, glob patterns, or the word ``stdlib``: the standard library of the running Python.
        window: Positions ``T`` that the trunk reads.
        lookahead: The largest horizon; a row holds ``window + lookahead`` tokens.
        batch_size: Rows of a batch of one process.
        tokenizer: Turns text into token ids; bytes if ``None``.
        suffixes: Which files of a folder to take; ``[".py"]`` if ``None``.
        val_share: Share of the files for validation; 0 leaves the split out.
        test_share: Share of the files for testing; 0 leaves the split out.
        seed: Another seed is another training order; the split does not depend on it.
        num_workers: Worker processes that prepare batches; cutting windows is cheap, 0 is usually right.
        max_eval_windows: Validate and test on at most so many windows, evenly spread.
        random_offsets: Tile from a new offset in every epoch; if false, every epoch reads the same windows.
        augmentation: Changes training rows; none if ``None``.
        cached_states: Cache a frozen trunk's hidden states of the training windows on disk, for
            :class:`~mtp_modules.training.MTPModule`; not with ``random_offsets`` or an augmentation, which change rows.

    Shape:
        ``tokens (B, window + lookahead)``; ``document_ids`` alike, only in batches where a row holds several documents.

    Raises:
        ValueError: If a size or a share is invalid; in ``setup``, if the sources do not give three usable splits.
    """

    def __init__(
        self,
        *,
        sources: list[str],
        window: int,
        lookahead: int,
        batch_size: int,
        tokenizer: Tokenizer | None = None,
        suffixes: list[str] | None = None,
        val_share: float = 0.05,
        test_share: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        max_eval_windows: int | None = None,
        random_offsets: bool = True,
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
        check_shares(val_share, test_share)
        if max_eval_windows is not None:
            whole(self, "max_eval_windows", max_eval_windows, 1)
        if cached_states is not None and (random_offsets or augmentation is not None):
            remedy = "set random_offsets to false" if random_offsets else "leave augmentation out"
            refuse(self, f"cached_states belong to one fixed set of windows; {remedy}.")
        self.sources = sources
        self.cached_states = cached_states
        self.window = window
        self.lookahead = lookahead
        self.tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
        self.suffixes = [".py"] if suffixes is None else suffixes
        self.val_share = val_share
        self.test_share = test_share
        self.max_eval_windows = max_eval_windows
        self.random_offsets = random_offsets
        self._datasets: dict[str, WindowDataset] | None = None
        self._cached_rows: CachedRows | None = None

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the files, once.

        Args:
            stage: Ignored; all splits are read together.
        """
        if self._datasets is not None:
            return
        streams = load_splits(
            self.sources, self.tokenizer, suffixes=self.suffixes, val_share=self.val_share, test_share=self.test_share
        )
        self._datasets = {
            split: WindowDataset(
                stream=stream,
                window=self.window,
                lookahead=self.lookahead,
                name=f"text of the {split} split",
                random_offsets=self.random_offsets,
            )
            for split, stream in streams.items()
        }

    def training_rows(self) -> TokenRows:
        """Return the training windows, wrapped in :class:`CachedRows` if hidden states are cached."""
        if self.cached_states is None:
            return super().training_rows()
        if self._cached_rows is None:
            self._cached_rows = CachedRows(super().training_rows(), window=self.window, kept=self.cached_states)
        return self._cached_rows

    def rows(self, split: str) -> WindowDataset | None:
        """Return the windows of a split, or ``None`` if its share is 0.

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
        line_end = self.tokenizer.encode("\n")
        end_token = self.tokenizer.end_token
        return pick_prompts(
            rows.stream,
            count=count,
            length=length,
            seed=seed,
            line_end=line_end[-1] if line_end else None,
            special=[] if end_token is None else [end_token],
        )
