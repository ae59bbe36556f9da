"""Data: files or formulas to batches of tokens."""

from mtp_modules.data.corpus import TokenStream, load_splits
from mtp_modules.data.counts import CountsAhead
from mtp_modules.data.module import TokenDataModule
from mtp_modules.data.synthetic import ProgressionCeiling, ProgressionDataModule, progression_ceiling
from mtp_modules.data.text import TextDataModule
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.data.windows import WindowDataset

__all__ = [
    "ByteTokenizer",
    "CountsAhead",
    "ProgressionCeiling",
    "ProgressionDataModule",
    "TextDataModule",
    "TokenDataModule",
    "TokenStream",
    "WindowDataset",
    "load_splits",
    "progression_ceiling",
]
