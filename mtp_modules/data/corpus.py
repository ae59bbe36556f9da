"""From files to token streams: find the files, split them, encode them. Pure functions, without Lightning."""

import glob
import hashlib
import itertools
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import fraction, refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.rows import IntArray
from mtp_modules.data.token_files import SUFFIX, read_documents

SPLITS = ("train", "val", "test")
"""The splits of a corpus."""

STDLIB = "stdlib"
"""A source that exists on every machine: the standard library of the running interpreter."""

# Some installations lack these folders; leaving them out gives the same text on every machine.
_NOT_IN_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus.

    Attributes:
        path: Where it is on this machine.
        name: Its path relative to the source it was found in, with forward slashes: the same on every machine.
        required: Whether it was named explicitly, so that it must not be left out silently.
        document: Which document of a file of tokens it is; ``None`` for text.
    """

    path: Path
    name: str
    required: bool = False
    document: int | None = None


@dataclass(frozen=True)
class TokenStream:
    """Concatenated documents.

    Attributes:
        tokens: All token ids, ``uint16`` or ``uint32``.
        document_starts: Where each document starts; ascending from 0.
        names: Name of each document.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    document_starts: IntArray
    names: tuple[str, ...]

    def digest(self) -> str:
        """Return a short hash of the tokens and the document boundaries."""
        state = hashlib.blake2b(np.ascontiguousarray(self.tokens).data, digest_size=16)
        state.update(self.document_starts.data)
        return state.hexdigest()


def find_files(sources: Sequence[str], suffixes: Sequence[str] = (".py",)) -> list[SourceFile]:
    """Return the files of the sources, each once, in an order that is the same on every machine.

    Args:
        sources: Files, folders, glob patterns, or the word ``stdlib``. A file of tokens (``.bin``) that is named by
            itself counts as one file for each of its documents.
        suffixes: Which files of a folder to take. Explicit files and patterns are not filtered.

    Raises:
        ValueError: If a source does not exist, or holds no file.
    """
    if isinstance(sources, str) or not sources:
        refuse(
            "TextDataModule",
            f"sources must be a list of at least one file, folder, pattern or 'stdlib', got {sources!r}.",
        )
    found: dict[tuple[Path, int | None], SourceFile] = {}
    for source in sources:
        files = _files_of(source, tuple(suffixes))
        if not files:
            refuse(
                "TextDataModule",
                f"source {source!r} holds no file that ends in {' or '.join(suffixes)}; name other files or suffixes.",
            )
        for file in files:
            found.setdefault((file.path.resolve(), file.document), file)
    return list(found.values())


def _files_of(source: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return _named(root, (path for path in root.rglob("*.py") if not _NOT_IN_STDLIB & _folders(root, path)))
    path = Path(source).expanduser()
    if path.is_dir():
        return _named(path, (file for file in path.rglob("*") if file.name.endswith(suffixes)))
    if path.exists() and path.suffix == SUFFIX:
        count = len(read_documents(path)[0])
        return [SourceFile(path, f"{path.name}/{index}", required=True, document=index) for index in range(count)]
    if path.exists():
        return [SourceFile(path, path.name, required=True)]
    if not glob.has_magic(source):
        refuse("TextDataModule", f"source {source!r} does not exist; give a file, a folder, a pattern, or 'stdlib'.")
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    return _named(root, (Path(match) for match in glob.iglob(str(path), recursive=True)))


def _folders(root: Path, path: Path) -> set[str]:
    return set(path.relative_to(root).parts[:-1])


def _named(root: Path, paths: Iterable[Path]) -> list[SourceFile]:
    files = (SourceFile(path, path.relative_to(root).as_posix()) for path in paths if path.is_file())
    return sorted((file for file in files if not _hidden(file.name)), key=lambda file: file.name)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def split_of(name: str, *, val_share: float, test_share: float) -> str:
    """Return the split of a file: a pure function of its name and the shares.

    Adding or removing other files never changes it.

    Args:
        name: Path relative to the source.
        val_share: Share of the files for validation.
        test_share: Share of the files for testing.
    """
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def check_shares(val_share: float, test_share: float) -> None:
    """Reject shares that leave nothing to train on.

    Raises:
        ValueError: If a share lies outside [0, 1], or their sum is not below 1.
    """
    fraction("TextDataModule", "val_share", val_share)
    fraction("TextDataModule", "test_share", test_share)
    if val_share + test_share >= 1:
        refuse(
            "TextDataModule",
            f"val_share + test_share must be below 1, got {val_share} + {test_share}; leave some files to train on.",
        )


def split_files(files: Sequence[SourceFile], *, val_share: float, test_share: float) -> dict[str, list[SourceFile]]:
    """Assign every file to one split.

    A split whose share is 0 is left out; any other split must get a file.

    Args:
        files: The corpus.
        val_share: Share of the files for validation.
        test_share: Share of the files for testing.

    Raises:
        ValueError: If the shares leave nothing to train on, or a split got no file.
    """
    check_shares(val_share, test_share)
    shares = {"train": 1.0, "val": val_share, "test": test_share}
    splits: dict[str, list[SourceFile]] = {split: [] for split in SPLITS if shares[split] > 0}
    for file in files:
        splits[split_of(file.name, val_share=val_share, test_share=test_share)].append(file)
    for split, members in splits.items():
        if not members:
            remedy = (
                "lower the other shares" if split == "train" else f"raise {split}_share, or set it to 0 to go without"
            )
            refuse("TextDataModule", f"the {split} split got none of the {len(files)} files; add files, {remedy}.")
    return splits


def encode_files(files: Sequence[SourceFile], tokenizer: Tokenizer) -> TokenStream:
    """Read files into one stream, each followed by the tokenizer's end token.

    Empty files are left out, and so are files of a folder or a pattern that are not UTF-8 text, with a warning.

    Args:
        files: Files to read.
        tokenizer: Turns the text into token ids.

    Raises:
        ValueError: If an explicitly named file is not text, or the tokenizer returns ids outside its vocabulary.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = [] if tokenizer.end_token is None else [tokenizer.end_token]
    pieces: list[npt.NDArray[np.unsignedinteger[Any]]] = []
    names: list[str] = []
    not_text: list[str] = []
    token_files: dict[Path, list[npt.NDArray[np.unsignedinteger[Any]]]] = {}
    for file in files:
        if file.document is not None:
            if file.path not in token_files:
                token_files[file.path] = _documents(file, tokenizer)
            pieces.append(token_files[file.path][file.document].astype(dtype))
            names.append(file.name)
            continue
        try:
            text = file.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            if file.required:
                refuse("TextDataModule", f"file {str(file.path)!r} is not UTF-8 text; convert it or leave it out.")
            not_text.append(file.name)
            continue
        ids = np.array(tokenizer.encode(text) + end, dtype=np.int64) if text else np.empty(0, dtype=np.int64)
        if not ids.size:
            continue
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            refuse(
                "TextDataModule",
                f"{type(tokenizer).__name__} gave {file.name!r} a token outside 0..{tokenizer.vocab_size - 1}.",
            )
        pieces.append(ids.astype(dtype))
        names.append(file.name)
    if not_text:
        message = (
            f"TextDataModule: left out {len(not_text)} files that are not UTF-8 text, the first is {not_text[0]!r}."
        )
        warnings.warn(message, stacklevel=2)
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    tokens = np.concatenate([np.empty(0, dtype=dtype), *pieces])
    return TokenStream(tokens, lengths.cumsum() - lengths, tuple(names))


def _documents(file: SourceFile, tokenizer: Tokenizer) -> list[npt.NDArray[np.unsignedinteger[Any]]]:
    """Read a file of tokens, and reject those of another vocabulary."""
    documents, vocab_size = read_documents(file.path)
    if vocab_size != tokenizer.vocab_size:
        refuse(
            "TextDataModule",
            f"{file.path} holds tokens of a vocabulary of {vocab_size}, {type(tokenizer).__name__} has "
            f"{tokenizer.vocab_size}; give the tokenizer that the tokens were sampled with.",
        )
    return documents


def load_splits(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    suffixes: Sequence[str] = (".py",),
    val_share: float = 0.05,
    test_share: float = 0.05,
) -> dict[str, TokenStream]:
    """Find, split and encode: the corpus of :class:`TextDataModule` for use without Lightning.

    Args:
        sources: Files, folders, glob patterns, or the word ``stdlib``.
        tokenizer: Turns the text into token ids.
        suffixes: Which files of a folder to take.
        val_share: Share of the files for validation.
        test_share: Share of the files for testing.

    Raises:
        ValueError: If a source or a share is invalid.
    """
    splits = split_files(find_files(sources, suffixes), val_share=val_share, test_share=test_share)
    return {split: encode_files(files, tokenizer) for split, files in splits.items()}
