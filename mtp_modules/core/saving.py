"""Write files so that a reader finds the old content or the new content, whole, whatever happens meanwhile.

A file is written beside its target, flushed to the disk, read back, and renamed; then its folder is flushed. A process
that is killed leaves a file whose name ends in ``.partial``, which the next writer of the same target removes.
"""

import ctypes
import errno
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.checksums import CHECKSUMS, SealedFile, damaged_record, file_checksum

_SUFFIX = ".partial"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; afterwards, the file there replaces ``path``.

    Args:
        path: The target; its folder is created if it does not exist.

    Raises:
        ValueError: If it cannot be written: no permission, a full disk. What was there is unchanged.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with atomic_file(folder / "figures.json") as partial:
        ...     _ = partial.write_text("{}")
        >>> [file.name for file in folder.iterdir()]
        ['figures.json']
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}{_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        refuse(
            "saving", f"{path} could not be written ({_reason(error)}); what was there is unchanged. {_advice(error)}"
        )
    finally:
        with suppress(OSError):  # of a folder that turned read-only
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Args:
        path: The target.
        text: Its whole content.

    Raises:
        ValueError: If it cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_checkpoint(content: Any, path: str | Path) -> None:
    """Write tensors and plain values with ``torch.save``, atomically, and read the file back before it counts.

    Args:
        content: Of the checkpoint.
        path: The target; a folder of shards that is there is replaced.

    Raises:
        ValueError: If it cannot be written, or does not read back as it was written.
    """
    path = Path(path)
    crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with atomic_file(path) as partial:
            with partial.open("wb") as file:
                writer = SealedFile(file)
                try:
                    torch.save(content, cast(BinaryIO, writer))
                except RuntimeError as error:  # torch's writer raises its own error after a write that failed
                    if writer.error is None:
                        raise
                    raise writer.error from error
                writer.finish()
            if (damaged := damaged_record(partial)) is not None:
                raise OSError(errno.EIO, f"{damaged or path.name} did not read back as it was written")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
    finally:
        torch.serialization.set_crc32_options(crc32)


def finish_folder(partial: Path, path: Path) -> None:
    """Replace a folder by another that is complete, with the checksum of each of its files.

    Args:
        partial: Folder with the new content, in the same file system.
        path: The target; whatever is there is replaced.

    Raises:
        ValueError: If it cannot be written.
    """
    try:
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        lines = "".join(f"{file_checksum(file):08x} {file.relative_to(partial)}\n" for file in files)
        (partial / CHECKSUMS).write_text(lines, encoding="utf-8")
        for file in (*files, partial / CHECKSUMS, partial):
            flush(file)
        if not os.path.lexists(path):
            partial.rename(path)
        elif not _exchange(partial, path):
            aside = path.with_name(f".{path.name}.old{_SUFFIX}")
            _remove(aside)
            path.rename(aside)
            partial.rename(path)
            _remove(aside)
        flush(path.parent)
        _remove(partial)
    except OSError as error:
        refuse(
            "saving", f"{path} could not be written ({_reason(error)}); what was there is unchanged. {_advice(error)}"
        )


def check_folder(owner: object, folder: Path, *, needed: int = 0) -> None:
    """Raise an error for a folder that cannot be written to, before any work is done for it.

    Args:
        owner: Named in the error message.
        folder: Created if it does not exist.
        needed: Bytes that files there will take.

    Raises:
        ValueError: If no file can be written there, or less than ``needed`` bytes are free.
    """
    probe = folder / f".probe.{platform.node()}-{os.getpid()}{_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        free = shutil.disk_usage(folder).free
        probe.unlink()
    except OSError as error:
        refuse(owner, f"{folder} cannot be written to ({_reason(error)}). {_advice(error)}")
    if free < needed:
        refuse(owner, f"{folder} has {_size(free)} free, and its files may take {_size(needed)}; free some space.")


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left in a folder that no other process writes to.

    Args:
        folder: Of a run that begins.
    """
    for left in folder.glob(f".*{_SUFFIX}"):
        _remove(left)


def flush(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk.

    Args:
        path: File or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it, for folders
            raise
    finally:
        os.close(handle)


def _remove_left_over(path: Path) -> None:
    """Remove the partial files of a target that processes of this machine left when they were killed."""
    own = f".{path.name}.{platform.node()}-"
    for left in path.parent.glob(f".*{_SUFFIX}"):
        if left.name.startswith(own):
            number = left.name.removeprefix(own).removesuffix(_SUFFIX)
            if number == str(os.getpid()) or not (number.isdecimal() and _runs(int(number))):
                _remove(left)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two paths in one step; return whether this system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done: int = rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE)
    return done == 0


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free some space, or write to another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Give this process permission to write there, or name another folder."
    return "Name another folder."


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
