"""Checksums of what is saved, and what they say of a file that is read."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import torch

from mtp_modules.core.shapes import Tensor

_MARK = b"mtp_modules crc32 "
CHECKSUMS = "checksums.txt"
"""File with the CRC-32 of every other file of a folder that :func:`finish_folder` wrote."""


class SealedFile:
    """A file for ``torch.save`` that remembers why a write failed, and ends with the checksum of all before it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._checksum, self._length = 0, b""  # the archive ends with the length of its comment, two bytes
        self.error: OSError | None = None

    def write(self, block: bytes | memoryview) -> int:
        """Write a block, and return its length.

        Args:
            block: Of any length.
        """
        try:
            written = self._file.write(block)
        except OSError as error:
            self.error = error
            raise
        if len(block) < 2:
            block = self._length + bytes(block)
        else:
            self._checksum = zlib.crc32(self._length, self._checksum)
        self._checksum, self._length = zlib.crc32(block[:-2], self._checksum), bytes(block[-2:])
        return written

    def flush(self) -> None:
        """Flush the file below."""
        self._file.flush()

    def finish(self) -> None:
        """Write the comment."""
        length = (len(_MARK) + 8).to_bytes(2, "little")
        self._file.seek(-2, os.SEEK_END)
        self._file.write(length + _MARK + b"%08x" % zlib.crc32(length, self._checksum))


def damaged_record(path: Path) -> str | None:
    """Return which tensor is damaged in a file of ``torch.save``; ``None`` if none is.

    :func:`save_checkpoint` writes a checksum of the whole file into the comment of its zip archive. Of other files, the
    checksum of every record is compared, which torch itself does not do. An empty name means that the file is none of
    ``torch.save``, or that its list of records is damaged.

    Args:
        path: Of the file.
    """
    try:
        whole = _holds(path)
        return None if whole else _damaged_record(path, sealed=whole is not None)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error):
        return ""


def _holds(path: Path) -> bool | None:
    """Return whether a file has the checksum that stands at its end; ``None`` if none stands there."""
    size, mark = path.stat().st_size, len(_MARK) + 8
    with path.open("rb") as file:
        file.seek(max(0, size - mark))
        text = file.read()
        if not text.startswith(_MARK):
            return None
        file.seek(0)
        return text == _MARK + b"%08x" % _checksum_of(file, size - mark)


def _damaged_record(path: Path, *, sealed: bool) -> str | None:
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            return ""  # records overlap, and would be read again and again
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.is_dir() or record.external_attr & 0x10:
                return ""
        if (damaged := archive.testzip()) is not None:
            return damaged
        return "" if sealed or archive.comment else None  # the damage lies in the headers


def damaged_file(folder: Path) -> str | None:
    """Return what is damaged in a folder that :func:`finish_folder` wrote; ``None`` if nothing is.

    Args:
        folder: Of the checkpoint.
    """
    try:
        pairs = expected_checksums(folder)
        there = {
            str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and not file.is_symlink()
        }
        wrong = (
            name for name, expected in pairs.items() if name not in there or file_checksum(folder / name) != expected
        )
        missing = CHECKSUMS if not pairs else None
        return next(wrong, missing)
    except (OSError, ValueError) as error:
        return str(getattr(error, "filename", None) or CHECKSUMS)


def expected_checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of the files of a folder that :func:`finish_folder` wrote, by their paths in it.

    Args:
        folder: Of the checkpoint or the cache.

    Raises:
        ValueError: If the list cannot be read.
        OSError: If there is none.
    """
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    if any(f"{int(value, 16):08x}" != value for value, _ in pairs):  # the same number may be written otherwise
        raise ValueError(f"{CHECKSUMS} holds what is no checksum")
    return {name: int(value, 16) for value, name in pairs}


def tensor_checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's values.

    Args:
        tensor: On any device.
    """
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def file_checksum(path: Path) -> int:
    """Return the CRC-32 of a file.

    Args:
        path: Of the file.
    """
    with path.open("rb") as file:
        return _checksum_of(file, path.stat().st_size)


def _checksum_of(file: BinaryIO, length: int) -> int:
    """Return the CRC-32 of the next bytes of a file."""
    value = 0
    while block := file.read(min(length, 1 << 20)):
        value, length = zlib.crc32(block, value), length - len(block)
    return value
