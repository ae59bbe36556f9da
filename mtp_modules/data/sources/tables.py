"""Tables and data sets, read by the package ``datasets``, which is imported when one is read."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mtp_modules.core.checks import InputError, refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, FileHash
from mtp_modules.data.sources.files import FoundFile, find_files
from mtp_modules.data.sources.json_lines import document_of

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


class TableFiles(DocumentSource):
    """Files of tables, Parquet, CSV, TSV or Arrow, of which each row is a document. Needs the extra ``data``.

    The files are read row by row, and never as a whole.

    Args:
        paths: Files, folders (of which those that end in a known suffix are taken) or glob patterns.
        field: The column with the text, or with the messages that :class:`~mtp_modules.data.Chat` reads.

    Raises:
        ValueError: In ``documents``, if ``datasets`` is missing, a path does not exist, a file is damaged or of an
            unknown kind, or there is no such column.
    """

    def __init__(self, *, paths: Sequence[str], field: str = "text") -> None:
        self.paths, self.field = paths, field
        self.skipped = {}

    def files(self) -> list[FoundFile]:
        """Return the files, each once, in an order that is the same on every machine.

        Raises:
            ValueError: If a path does not exist, holds no file, or is of an unknown kind.
        """
        files = find_files(self, self.paths, tuple(_FORMATS), self.skipped)
        for file in files:
            if file.path.suffix not in _FORMATS:
                refuse(self, f"file {str(file.path)!r} is none of {', '.join(_FORMATS)}; convert it, or name others.")
        return files

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield every row.

        Raises:
            ValueError: If ``datasets`` is missing, a file is damaged, or there is no such column.
        """
        del tokenizer
        self.skipped = {}
        load = _datasets(self).load_dataset
        for file in self.files():
            suffix = file.path.suffix
            options: dict[str, Any] = {"data_files": [str(file.path.resolve())], "split": "train"}
            if suffix in _SEPARATORS:  # "NA" and "007" are texts
                options |= {
                    "sep": _SEPARATORS[suffix],
                    "keep_default_na": False,
                    "converters": {self.field: str},
                    "index_col": False,
                }
            rows = partial(load, _FORMATS[suffix], streaming=True, **options)
            yield from _documents(self, file.name, rows, self.field)

    def fingerprint(self, hash_file: FileHash) -> str:
        """Return the column, and names and hashes of the files."""
        return "\n".join([self.field, *(f"{file.name} {hash_file(file.path)}" for file in self.files())])


class HuggingFaceDataset(DocumentSource):
    """A data set of Hugging Face, of which each row is a document. Needs the extra ``data``.

    Args:
        dataset: Name on the hub, or a folder that ``save_to_disk`` wrote.
        split: Split of it.
        field: The column with the text, or with the messages that :class:`~mtp_modules.data.Chat` reads.
        subset: Name of the subset, if there are several.
        revision: A branch, a tag or a commit; a cache of tokens of a streamed data set notices no other change.
        streaming: Read rows from the hub while they are needed, and keep nothing on disk.

    Raises:
        ValueError: In ``documents``, if ``datasets`` is missing, the data set cannot be read, or there is no such split
            or column.
    """

    def __init__(
        self,
        *,
        dataset: str,
        split: str = "train",
        field: str = "text",
        subset: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
    ) -> None:
        self.dataset, self.split, self.field = dataset, split, field
        self.subset, self.revision, self.streaming = subset, revision, streaming
        self.skipped = {}
        self._loaded: Any = None

    def rows(self) -> Any:
        """Return the data set, loaded once.

        Raises:
            ValueError: If it cannot be read, or has no such split.
        """
        if self._loaded is None:
            package = _datasets(self)
            try:
                self._loaded = self._load(package)
            except InputError:
                raise
            except Exception as error:  # the hub, the file system and the package each have errors of their own
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                refuse(self, f"dataset {self.dataset!r} cannot be read ({first[:200].rstrip('.')}).")
        return self._loaded

    def _is_saved(self) -> bool:
        """Return whether the data set is a folder that ``save_to_disk`` wrote."""
        return any((Path(self.dataset) / name).is_file() for name in ("state.json", "dataset_dict.json"))

    def _load(self, package: Any) -> Any:
        if not self._is_saved():
            options = {"split": self.split, "revision": self.revision, "streaming": self.streaming}
            return package.load_dataset(self.dataset, self.subset, **options)
        loaded = package.load_from_disk(self.dataset)
        if isinstance(loaded, package.DatasetDict):
            if self.split not in loaded:
                refuse(self, f"split must be one of {', '.join(loaded)}, got {self.split!r}.")
            loaded = loaded[self.split]
        return loaded

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield every row.

        Raises:
            ValueError: If the data set cannot be read, or has no such split or column.
        """
        del tokenizer
        self.skipped = {}
        yield from _documents(self, Path(self.dataset).name, self.rows, self.field)

    def fingerprint(self, hash_file: FileHash) -> str:
        """Return what names the rows and, where the data set is on disk, the package's own hash of them."""
        del hash_file
        content = getattr(self.rows(), "_fingerprint", "") if self._is_saved() or not self.streaming else ""
        return f"{self.dataset} {self.subset} {self.split} {self.revision} {self.field} {content}"

    def num_documents(self) -> int | None:
        """Return the number of rows of a data set that is not streamed."""
        return None if self.streaming else len(self.rows())


def _datasets(owner: object) -> Any:
    try:
        import datasets
    except ImportError:
        refuse(owner, "needs the package datasets; install mtp_modules with the extra data: pip install -e '.[data]'.")
    return datasets


def _documents(source: Any, name: str, rows: Callable[[], Any], field: str) -> Iterator[Document]:
    iterator: Any = None
    number = 0
    while True:
        number += 1
        try:
            iterator = iter(rows()) if iterator is None else iterator
            row = next(iterator, None)
        except InputError:
            raise
        except Exception as error:  # of any reader behind the package
            cause = error.__cause__ or error
            first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            refuse(source, f"row {number} of {name!r} cannot be read ({first[:200].rstrip('.')}).")
        if row is None:
            return
        if field in row and row[field] in ("", None, []):
            source.skipped.setdefault("empty", []).append(f"{name}:{number}")
        else:
            yield document_of(source, f"{name}:{number}", row, field)
