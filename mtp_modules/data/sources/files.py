"""Find the files that paths, folders and patterns name, and read text from them."""

import glob
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mtp_modules.core.checks import refuse

PART = 2**17
"""Characters of a part of a long text."""

JSON_LINES = (".jsonl", ".ndjson")
"""How files of JSON lines end."""

_WHOLE = 2**20
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_LINES = re.compile(r"(?<=\S)\n(?=\S)")
_WORDS = re.compile(r"(?<=\S)(?= \S)")


@dataclass(frozen=True)
class FoundFile:
    """A file of a source.

    Attributes:
        path: Where it is on this machine.
        name: Its path relative to the folder it was found in, with forward slashes and composed characters (NFC): the
            same on every machine.
        required: Whether it was named explicitly, so that it must not be left out.
    """

    path: Path
    name: str
    required: bool = False


def find_files(
    owner: object, paths: Sequence[str], suffixes: Sequence[str] | None, skipped: dict[str, list[str]]
) -> list[FoundFile]:
    """Return the files that paths name, each once, in an order that is the same on every machine.

    Args:
        owner: Named in errors.
        paths: Files, folders or glob patterns. A part of a pattern that exists as it is spelled is no pattern.
        suffixes: Which files of a folder to take; all if ``None``. Explicit files and patterns are not filtered.
        skipped: Gets the names of what was left out, by reason.

    Raises:
        ValueError: If a path does not exist, or holds no file.
    """
    if isinstance(paths, str) or not paths:
        refuse(owner, f"paths must be a list of at least one file, folder or pattern, got {paths!r}.")
    found: dict[Path, FoundFile] = {}
    for path in paths:
        files = _files_of(owner, path, suffixes, skipped)
        if not files:
            wanted = f" that ends in {' or '.join(suffixes)}" if suffixes else ""
            refuse(owner, f"source {path!r} holds no file{wanted}; name other files or suffixes.")
        for file in files:
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def _files_of(
    owner: object, source: str, suffixes: Sequence[str] | None, skipped: dict[str, list[str]]
) -> list[FoundFile]:
    path = _existing(Path(source).expanduser())
    if path.is_dir():
        return files_below(path, skipped, lambda name: suffixes is None or name.endswith(tuple(suffixes)))
    if path.exists():
        return [FoundFile(path, _name(path.name), required=True)]
    if not glob.has_magic(source):
        refuse(owner, f"source {source!r} does not exist; give a file, a folder, a pattern, or 'stdlib'.")
    root, rest = Path(path.anchor), list(path.parts[1 if path.anchor else 0 :])
    while rest and (_existing(root / rest[0])).exists():
        root = _existing(root / rest.pop(0))
    matches = (root / match for match in glob.glob("/".join(rest), root_dir=root, recursive=True))
    return _sorted(root, matches, skipped)


def _existing(path: Path) -> Path:
    """Return the path as this file system spells it: composed or decomposed characters."""
    if not path.exists():
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            if other.exists():
                return other
    return path


def files_below(
    root: Path, skipped: dict[str, list[str]], wanted: Callable[[str], bool], without: frozenset[str] = frozenset()
) -> list[FoundFile]:
    """Return the files of a folder and its subfolders, symbolic links followed, hidden ones left out.

    Args:
        root: The folder.
        skipped: Gets the names of what was left out, by reason.
        wanted: Whether to take a file, by its name.
        without: Names of folders to leave out.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        below = "" if folder == str(root) else os.path.relpath(folder, root) + "/"
        hidden = [name for name in folders if _hidden(name)]
        skipped.setdefault("hidden", []).extend(_name(below + name) for name in hidden)
        folders[:] = sorted(set(folders) - set(hidden) - without)
        taken = [name for name in files if wanted(name)]
        paths += [Path(folder, name) for name in taken]
        others = sorted(set(files) - set(taken))
        skipped.setdefault("with another suffix", []).extend(_name(below + name) for name in others)
    return _sorted(root, paths, skipped)


def _sorted(root: Path, paths: Iterable[Path], skipped: dict[str, list[str]]) -> list[FoundFile]:
    files = []
    for path in paths:
        name = _name(path.relative_to(root).as_posix())
        if any(_hidden(part) for part in name.split("/")):
            skipped.setdefault("hidden", []).append(name)
        elif path.is_file():
            files.append(FoundFile(path, name))
        elif not path.is_dir():
            skipped.setdefault("that are links to nothing, or no files", []).append(name)
    return sorted(files, key=lambda file: file.name)


def _name(name: str) -> str:
    composed = unicodedata.normalize("NFC", name)
    return composed.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # bytes that are no text


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def read_text(owner: object, file: FoundFile) -> str | Iterator[str] | None:
    """Return the text of a file, a long one as an iterator of parts; ``None`` if it is not text.

    A byte-order mark is dropped, and so is the carriage return of a line end.

    Args:
        owner: Named in errors.
        file: The file.

    Raises:
        ValueError: If a file that was named explicitly is not text; while parts are read, if a later one is not.
    """
    with file.path.open("rb") as opened:
        beginning = opened.read(_WHOLE + 1)
    encoding = next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), "utf-8")
    if len(beginning) > _WHOLE and _is_text(beginning[:_WHOLE], encoding):
        if not (file.required or _is_text_throughout(file.path, encoding)):
            return None
        return _parts_of_file(owner, file, encoding)
    try:
        text = beginning.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        return text.replace("\r\n", "\n").replace("\r", "\n")
    if file.required:
        refuse(owner, f"file {str(file.path)!r} is not UTF-8 text; convert it or leave it out.")
    return None


def _is_text(beginning: bytes, encoding: str) -> bool:
    try:
        return "\0" not in beginning.decode(encoding)
    except UnicodeDecodeError as error:
        return error.end > len(beginning) - 4 and "\0" not in beginning[: error.start].decode(encoding)


def _is_text_throughout(path: Path, encoding: str) -> bool:
    with path.open(encoding=encoding, newline="") as opened:
        try:
            return not any("\0" in block for block in iter(partial(opened.read, PART), ""))
        except UnicodeDecodeError:
            return False


def _parts_of_file(owner: object, file: FoundFile, encoding: str) -> Iterator[str]:
    """Yield parts of a long file."""
    left = ""
    with file.path.open(encoding=encoding) as opened:
        while True:
            try:
                block = opened.read(PART)
            except UnicodeDecodeError:
                block = "\0"
            if "\0" in block:
                refuse(owner, f"file {str(file.path)!r} begins as text but is not UTF-8 text throughout; repair it.")
            if not block:
                break
            *parts, left = cut_text(left + block)
            yield from parts
    if left:
        yield left


def cut_text(text: str) -> list[str]:
    """Return a long text in parts of about ``PART`` characters.

    Parts end where a line does, between two that have no white space there: tokens seldom span such a place. Where
    there is none, they end before a word, and where there is none either, anywhere.

    Args:
        text: Any text.
    """
    parts = []
    start = 0
    while len(text) - start > PART:
        window = text[start : start + PART + 1]
        cut = max((match.end() for match in _LINES.finditer(window, PART // 2)), default=0)
        cut = cut or max((match.end() for match in _WORDS.finditer(window, PART // 2)), default=0) or PART
        parts.append(window[:cut])
        start += cut
    return [*parts, text[start:]]
