"""Sources of documents, one kind a file."""

import glob
from collections.abc import Sequence
from pathlib import Path

from mtp_modules.core.checks import refuse
from mtp_modules.data.documents import DocumentSource
from mtp_modules.data.sources.chat import Chat
from mtp_modules.data.sources.files import JSON_LINES, find_files
from mtp_modules.data.sources.json_lines import JsonLines, field_of
from mtp_modules.data.sources.standard_library import StandardLibrary
from mtp_modules.data.sources.tables import HuggingFaceDataset, TableFiles
from mtp_modules.data.sources.text_files import TextFiles
from mtp_modules.data.sources.token_files import TokenFiles
from mtp_modules.data.token_files import SUFFIX

__all__ = [
    "Chat",
    "HuggingFaceDataset",
    "JsonLines",
    "StandardLibrary",
    "TableFiles",
    "TextFiles",
    "TokenFiles",
    "sources_of",
]

STDLIB = "stdlib"
"""A word for :class:`StandardLibrary`."""


def sources_of(owner: object, given: Sequence[DocumentSource | str]) -> list[DocumentSource]:
    """Return sources, those for which a path stands by what the path names.

    ``stdlib`` is the standard library, ``NAME.bin`` a file of tokens, a file that ends in ``.jsonl`` or ``.ndjson`` one
    of JSON lines, and ``NAME.parquet`` a table with a column ``text``. Neighbouring paths of text are one source, in
    which each file counts once.

    Args:
        owner: Named in errors.
        given: Sources, or paths.

    Raises:
        ValueError: If there is none, or a file of JSON lines has neither texts nor messages.
    """
    if isinstance(given, str) or not given:
        refuse(
            owner,
            f"sources must be a list of at least one source, file, folder, pattern or 'stdlib', got {given!r}.",
        )
    made: list[DocumentSource] = []
    paths: list[str] = []
    for each in [*given, None]:
        if isinstance(each, str) and (each != STDLIB and _special(each) is None):
            paths.append(each)
            continue
        if paths:
            made.append(TextFiles(paths=paths))
            paths = []
        if isinstance(each, str):
            special = _special(each)
            made.append(StandardLibrary() if special is None else special)
        elif each is not None:
            made.append(each)
    return made


def _special(path: str) -> DocumentSource | None:
    """Return the source of a file that is not text; ``None`` for any other path."""
    if path.endswith(SUFFIX) and Path(path).is_file():
        return TokenFiles(paths=[path])
    if path.endswith((".parquet", ".arrow")):
        return TableFiles(paths=[path])
    if path.endswith(JSON_LINES) and (Path(path).is_file() or glob.has_magic(path)):
        first = find_files("sources", [path], JSON_LINES, {})[0]
        field = field_of("sources", first.path)
        lines = JsonLines(paths=[path], field=field)
        return lines if field == "text" else Chat(source=lines)
    return None
