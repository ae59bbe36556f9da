"""Numbers in memory-mapped files, which are checked when they are first read."""

import copy
import mmap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import refuse
from mtp_modules.core.checksums import file_checksum

_LONG = 2**26
_MANY = 2**20
"""Elements of a slice after which the pages that it was read from no longer count as memory of the process."""


class ShardedArray:
    """Memory-mapped files, one behind the other, read like one array.

    A file is checked when something of it is read for the first time. Another process that gets the array maps the
    files again.

    Args:
        paths: Of files of plain numbers; empty ones do not count.
        dtype: Of the numbers.
        checksums: CRC-32 of files by their names; one that is not in it is not checked.
        start: First element.
        end: Behind the last element; that of the files if ``None``.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        dtype: Any,
        *,
        checksums: Mapping[str, int] | None = None,
        start: int = 0,
        end: int | None = None,
    ) -> None:
        self._checksums = dict(checksums or {})
        self.paths, self.dtype = tuple(path for path in paths if path.stat().st_size), np.dtype(dtype)
        self._map()
        self._start = start
        self._end = (int(self._ends[-1]) if self._parts else 0) if end is None else end

    def _map(self) -> None:
        self._parts = [np.memmap(path, dtype=self.dtype, mode="r") for path in self.paths]
        self._unchecked = {index for index, path in enumerate(self.paths) if path.name in self._checksums}
        self._ends = np.array([len(part) for part in self._parts], dtype=np.int64).cumsum()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the maps."""
        return {name: value for name, value in vars(self).items() if name not in ("_parts", "_ends", "_unchecked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the files.

        Args:
            state: Result of ``__getstate__``.
        """
        vars(self).update(state)
        self._map()

    def __len__(self) -> int:
        return self._end - self._start

    def __getitem__(self, places: Any) -> Any:
        """Return the elements at places, or a slice; a very long slice is another view of the same files.

        Args:
            places: A slice without step, or whole numbers of any shape.
        """
        if isinstance(places, slice):
            start, end, _ = places.indices(len(self))
            start, end = self._start + start, self._start + end
            long = end - start > _LONG
            return self._view(start, end) if long else self._read(start, end)
        wanted = np.asarray(places)
        wanted = np.where(wanted < 0, wanted + len(self), wanted) + self._start
        parts = np.searchsorted(self._ends, wanted, side="right")
        found = np.empty(wanted.shape, dtype=self.dtype)
        for part in np.unique(parts):
            here = parts == part
            found[here] = self._checked(int(part))[wanted[here] - (self._ends[part] - len(self._parts[part]))]
        return found if found.ndim else found[()]

    def whole(self) -> npt.NDArray[Any]:
        """Return all elements in memory."""
        return self._read(self._start, self._end)

    def _view(self, start: int, end: int) -> "ShardedArray":
        view = copy.copy(self)  # with the same maps, and the same note of what was checked
        view._start, view._end = start, end
        return view

    def _checked(self, index: int) -> npt.NDArray[Any]:
        """Return a file's numbers."""
        if index in self._unchecked:
            path = self.paths[index]
            if file_checksum(path) != self._checksums[path.name]:
                _refuse_damaged(path)
            self._unchecked.discard(index)
        return self._parts[index]

    def _read(self, start: int, end: int) -> npt.NDArray[Any]:
        pieces: list[npt.NDArray[Any]] = [np.empty(0, dtype=self.dtype)]
        touched = []
        for index, behind in enumerate(self._ends.tolist()):
            begin = behind - len(self._parts[index])
            if begin < end and behind > start:
                touched.append(self._checked(index))
                pieces.append(touched[-1][max(start - begin, 0) : end - begin])
        found = np.concatenate(pieces)
        for part in touched if end - start >= _MANY else ():
            _release(part)
        return found


def _release(part: npt.NDArray[Any]) -> None:
    """Let the system take the pages of a map back; they are read again from the file when they are needed."""
    pages: Any = part.base
    if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def read_checked(path: Path, checksums: Mapping[str, int]) -> bytes:
    """Return the content of a file.

    Args:
        path: Of the file.
        checksums: CRC-32 of files by their names; one that is not in it is not checked.

    Raises:
        ValueError: If it has another checksum.
    """
    content = path.read_bytes()
    if path.name in checksums and zlib.crc32(content) != checksums[path.name]:
        _refuse_damaged(path)
    return content


def _refuse_damaged(path: Path) -> NoReturn:
    refuse("cache", f"{path} is damaged (another checksum); remove {path.parent}, and it is built again.")
