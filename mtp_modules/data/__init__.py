"""Data: files or formulas to batches of tokens.

Data modules and tasks need Lightning, and are imported when they are asked for. So a tokenizer, which a checkpoint may
name, can be built without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mtp_modules.data.augmentation import Augmentation, SpanShuffle, TokenDropout
from mtp_modules.data.cached_states import CachedStates
from mtp_modules.data.corpus import load_splits
from mtp_modules.data.counts import CountsAhead
from mtp_modules.data.documents import Document, DocumentSource
from mtp_modules.data.frequent import frequent_tokens
from mtp_modules.data.huggingface import HuggingFaceTokenizer
from mtp_modules.data.packing import PackedRows
from mtp_modules.data.resumable import ResumableLoader
from mtp_modules.data.sources import (
    Chat,
    HuggingFaceDataset,
    JsonLines,
    StandardLibrary,
    TableFiles,
    TextFiles,
    TokenFiles,
)
from mtp_modules.data.streams import TokenStream
from mtp_modules.data.tokenizers import ByteTokenizer, WordTokenizer
from mtp_modules.data.windows import WindowDataset

if TYPE_CHECKING:
    from mtp_modules.data.module import TokenDataModule
    from mtp_modules.data.polynomials import PolynomialTask
    from mtp_modules.data.star_graphs import StarGraphTask
    from mtp_modules.data.stories import StoryTask
    from mtp_modules.data.streamed import StreamedDataModule, StreamedRows
    from mtp_modules.data.synthetic import ProgressionCeiling, ProgressionDataModule, progression_ceiling
    from mtp_modules.data.tasks import Example, Task, TaskDataModule, TaskRows
    from mtp_modules.data.text import TextDataModule

_WITH_LIGHTNING = {
    "module": ("TokenDataModule",),
    "polynomials": ("PolynomialTask",),
    "star_graphs": ("StarGraphTask",),
    "streamed": ("StreamedDataModule", "StreamedRows"),
    "stories": ("StoryTask",),
    "synthetic": ("ProgressionCeiling", "ProgressionDataModule", "progression_ceiling"),
    "tasks": ("Example", "Task", "TaskDataModule", "TaskRows"),
    "text": ("TextDataModule",),
}

__all__ = [
    "Augmentation",
    "ByteTokenizer",
    "CachedStates",
    "Chat",
    "CountsAhead",
    "Document",
    "DocumentSource",
    "Example",
    "HuggingFaceDataset",
    "HuggingFaceTokenizer",
    "JsonLines",
    "PackedRows",
    "PolynomialTask",
    "ProgressionCeiling",
    "ProgressionDataModule",
    "ResumableLoader",
    "SpanShuffle",
    "StandardLibrary",
    "StarGraphTask",
    "StoryTask",
    "StreamedDataModule",
    "StreamedRows",
    "TableFiles",
    "Task",
    "TaskDataModule",
    "TaskRows",
    "TextDataModule",
    "TextFiles",
    "TokenDataModule",
    "TokenDropout",
    "TokenFiles",
    "TokenStream",
    "WindowDataset",
    "WordTokenizer",
    "frequent_tokens",
    "load_splits",
    "progression_ceiling",
]


def __getattr__(name: str) -> Any:
    for module, names in _WITH_LIGHTNING.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
