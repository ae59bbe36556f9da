"""Read pickles that come with data: archives of ``torch.save`` and folders of shards.

``torch.load(weights_only=True)`` runs no code, but it does what a file says: a kilobyte can ask for a terabyte, and
shards are read without it. So every file is first unpickled into stand-ins, which own no memory and run nothing. A file
passes if it names tensors and plain values only, and if its tensors are not larger than the file.
"""

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from mtp_modules.core.checks import InputError, refuse

_ITEM_BYTES = {
    **{"Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8},
    **{"Double": 8, "ComplexFloat": 8, "ComplexDouble": 16},
}
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))
_FORCED, _OPENED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _Part:
    """Stands for any object of a pickle."""

    def __new__(cls, *args: Any) -> "_Part":
        part = super().__new__(cls)
        part.state = args
        return part

    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Storage(_Part):
    """Stands for memory of a tensor."""

    num_bytes: int
    item_bytes: int


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], *_: Any) -> _Part:
    return _sized(storage, size, storage.item_bytes)


def _tensor_of_dtype(storage: _Storage, offset: int, size: tuple[int, ...], *rest: Any) -> _Part:
    return _sized(storage, size, next(each.itemsize for each in rest if isinstance(each, torch.dtype)))


def _sized(storage: _Storage, size: tuple[int, ...], item_bytes: int) -> _Part:
    if min(size, default=0) < 0 or math.prod(size) * item_bytes > storage.num_bytes:
        raise InputError(f"holds a tensor of the size {tuple(size)!s:.60} in {storage.num_bytes} bytes")
    return _Part()


def _empty_mapping() -> OrderedDict[Any, Any]:
    return OrderedDict()


_OF_TENSORS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_mapping,
    "_codecs.encode": _Part,
    "torch.Size": _Part,
    "torch.device": _Part,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _Part,
    "torch._utils._rebuild_parameter_with_state": _Part,
}
"""What ``torch.save`` writes for tensors and plain values."""

_OF_SHARDS: dict[str, Callable[..., Any]] = {
    "torch.Size": _Part,
    "torch.serialization._get_layout": _Part,
    "pathlib.PosixPath": _Part,
    "pathlib.WindowsPath": _Part,
    **{
        f"torch.distributed.checkpoint.{name}": type(name.rpartition(".")[2], (_Part,), {})
        for name in (
            *("metadata.Metadata", "metadata.TensorStorageMetadata", "metadata.TensorProperties"),
            *("metadata.ChunkStorageMetadata", "metadata.BytesStorageMetadata", "metadata.MetadataIndex"),
            *("metadata.StorageMeta", "metadata._MEM_FORMAT_ENCODING", "filesystem._StorageInfo"),
        )
    },
}
"""What ``torch.distributed.checkpoint`` writes into ``.metadata``."""


class _Inspector(pickle._Unpickler):
    """Unpickle into stand-ins. The unpickler in Python, because the one in C allocates what an opcode asks for."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code])
        not in (
            *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID),
            *(pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8),
            *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
        )
    }

    def __init__(self, content: bytes, known: Mapping[str, Callable[..., Any]], records: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._known, self._records, self._left = known, records, len(content)

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in self._known and self._known is _OF_TENSORS:
            bounded = {"torch.Size": self._size, "_codecs.encode": self._encode}.get(path)
            if bounded is not None:
                return bounded
        if path in self._known:
            return self._known[path]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return "UntypedStorage" if name == "UntypedStorage" else name.removesuffix("Storage")
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if path in _safe_globals():
            return _Part
        raise InputError(f"names {path[:100]}, and only tensors and plain values are loaded")

    def _size(self, dimensions: Any) -> tuple[Any, ...]:
        self._spend(len(dimensions))
        return tuple(dimensions)

    def _encode(self, text: str, encoding: str) -> _Part:
        if encoding != "latin1":  # others may take any time; bytes are written in this one
            raise InputError(f"has bytes in the encoding {encoding!r:.40}")
        self._spend(len(text))
        return _Part()

    def _spend(self, elements: int) -> None:
        """Raise an error if values that are referred to again become more than the file is long."""
        self._left -= elements
        if self._left < 0:
            raise InputError("repeats values until they are more than it is long")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid
        storage = _Storage()
        storage.item_bytes = 1 if kind == "UntypedStorage" else _ITEM_BYTES[kind]
        storage.num_bytes = count * storage.item_bytes
        if not 0 <= storage.num_bytes <= self._records[key]:
            raise InputError(f"holds a tensor of {storage.num_bytes} bytes in a record of {self._records[key]}")
        return storage

    def _set_item(self: Any) -> None:
        _check_key(self.stack[-2])
        pickle._Unpickler.dispatch[pickle.SETITEM[0]](self)

    def _set_items(self: Any) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        pickle._Unpickler.dispatch[pickle.SETITEMS[0]](self)

    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = _set_item, _set_items


def _check_key(key: Any) -> None:
    """Raise an error for a nested key, whose hash can take forever."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (*_PLAIN_KEYS, _Part)) for part in parts):
        raise InputError("has a key that is no plain value")


def _safe_globals() -> set[str]:
    """Return what the user's own code has allowed, with ``torch.serialization.add_safe_globals``."""
    given = torch.serialization.get_safe_globals()
    return {each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}" for each in given}


def load_pickle(owner: str, path: Path, *, mapped: bool = False) -> Any:
    """Read a file of ``torch.save`` that holds tensors and plain values, to the CPU.

    Args:
        owner: Named in the error message.
        path: Of the file.
        mapped: Memory-map the tensors.

    Raises:
        ValueError: If the file holds anything else, or asks for more memory than it is long; other exceptions if it is
            damaged.
    """
    check_pickle(owner, path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def check_pickle(owner: str, path: Path) -> None:
    """Raise an error for a file of ``torch.save`` that is not safe to load; see :func:`load_pickle`.

    Args:
        owner: Named in the error message.
        path: Of the file.

    Raises:
        ValueError: If it is not safe; other exceptions if it is damaged.
    """
    try:
        with path.open("rb") as file:
            _inspect(file, path.stat().st_size)
    except InputError as error:
        refuse(owner, f"{path} {error}; load it where it was made, and save its tensors with torch.save.")


def _inspect(file: Any, length: int) -> None:
    """Unpickle an archive of ``torch.save`` into stand-ins."""
    begin = file.read(len(_BEFORE_1_6))
    if begin == _BEFORE_1_6:
        raise InputError("is from before torch 1.6, whose files are not checked")
    if not begin.startswith(b"PK\x03\x04"):
        raise ValueError
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError("has compressed entries, which torch.save never writes")
        folders = {entry.filename.partition("/")[0] for entry in entries}
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
        if len(folders) != 1 or len(sizes) != len(entries) or sum(sizes.values()) > length:
            raise InputError("has entries that overlap")
        records = {name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")}
        _Inspector(archive.read(f"{folders.pop()}/data.pkl"), _OF_TENSORS, records).load()


def check_shards(owner: str, folder: Path) -> None:
    """Raise an error for a folder of ``torch.distributed.checkpoint`` that is not safe to load.

    torch unpickles its ``.metadata``, and what is no tensor in its shards, without any restriction.

    Args:
        owner: Named in the error message.
        folder: Of the checkpoint.

    Raises:
        ValueError: If a file names anything but tensors and plain values, asks for more memory than it is long, or is
            damaged.
    """
    name = ".metadata"
    try:
        metadata = _Inspector((folder / name).read_bytes(), _OF_SHARDS, {}).load()
        for place in metadata.state["storage_data"].values():
            name, start, length = (place.state[key] for key in ("relative_path", "offset", "length"))
            if place.state.get("transform_descriptors") or Path(name).name != name:
                raise InputError("is not stored as it is in a file of the folder")
            if start < 0 or length < 0 or start + length > (folder / name).stat().st_size:
                raise InputError(f"ends before the byte {start + length}, where .metadata has a tensor")
            with (folder / name).open("rb") as file:
                _inspect(_Window(file, start, length), length)
    except InputError as error:
        refuse(owner, f"{folder / name} {error}; get the folder from its author again.")
    except Exception:  # an invalid pickle can raise anything
        refuse(owner, f"{folder / name!s} is damaged, or missing; give the folder of a finished save.")


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = (0, self._place, self._length)[whence] + offset
        if self._place < 0:
            raise OSError("before the beginning")
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._place, 0)
        self._file.seek(self._start + self._place)
        found = self._file.read(left if size < 0 else min(size, left))
        self._place += len(found)
        return found


@contextmanager
def only_weights() -> Iterator[None]:
    """Let every ``torch.load`` unpickle tensors and plain values only, in libraries too, and whatever they ask for.

    The environment variable is the only setting of torch that a call cannot override. Its opposite would open loads
    that do not say what they want.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _OPENED)}
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})
