"""Tokens on disk: written once, in shards that are memory-mapped, under a key of the documents and the tokenizer."""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import InputError, refuse
from mtp_modules.core.checksums import expected_checksums, file_checksum
from mtp_modules.core.component import describe
from mtp_modules.core.saving import atomic_file, check_folder, finish_folder, write_text
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.corpus import (
    Sources,
    assigned_documents,
    effective_shares,
    finished,
    splits_of,
)
from mtp_modules.data.documents import FileHash
from mtp_modules.data.encoding import encode_documents, token_type
from mtp_modules.data.sharded_array import ShardedArray, read_checked
from mtp_modules.data.streams import SplitBuffer, TokenStream

FORMAT = 2
SEGMENT = 2**24
"""Tokens after which what was read so far is written; an interrupted run goes on from there."""

_INDEX, _PROGRESS, _SEGMENT_SUMS = "index.json", "progress.json", "segment.{:05}.json"
Progress = Callable[[int, int | None], None]
"""Called with the bytes read so far, and all bytes if they are known."""


class _Names(Sequence[str]):
    """Names of documents in files, read when one is asked for."""

    def __init__(self, files: Sequence[Path], count: int, checksums: Mapping[str, int]) -> None:
        self._files, self._count, self._checksums = files, count, checksums
        self._names: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if self._names is None:
            texts = [read_checked(file, self._checksums).decode() for file in self._files]
            self._names = [json.loads(line) for text in texts for line in text.splitlines()]
        return self._names[index]


class _RememberedHashes(FileHash):
    """Hashes files, and remembers the hash of a file whose size and times are as before."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}
        self._changed = False

    def __call__(self, path: Path) -> str:
        stat = path.stat()  # the time of the last change of its state is nothing that a program can set
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        key = str(path.resolve())
        known = self._known.get(key)
        if not isinstance(known, list) or len(known) != 4 or known[:3] != state:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            self._known[key] = known = [*state, found]
            self._changed = True
        return str(known[3])

    def save(self) -> None:
        if self._changed:
            write_text(self._memory, json.dumps(self._known))


def cached_streams(
    folder: Path,
    sources: Sources,
    tokenizer: Tokenizer,
    *,
    val_share: float,
    test_share: float,
    train_share: float | None = None,
    progress: Progress | None = None,
) -> dict[str, TokenStream]:
    """Return the streams of a corpus from a cache, which is built first if it lacks them.

    One process builds, others wait for it; one that was interrupted goes on where the last segment ended. Another
    content of a file, another tokenizer or another share is another entry. A folder that can only be read serves what
    it holds.

    Args:
        folder: Of the cache.
        sources: Of the corpus.
        tokenizer: Turns text into token ids.
        val_share: Share of the divided sources for validation.
        test_share: Share of the divided sources for testing.
        train_share: Share of the divided sources for training; what the others leave if ``None``.
        progress: Called while the cache is built.

    Raises:
        ValueError: If a source or a share is invalid, a split gets no document, or the folder cannot be written to.
    """
    shares = effective_shares(sources, val_share=val_share, test_share=test_share, train_share=train_share)
    if folder.is_dir() and not os.access(folder, os.W_OK):  # such as a shared file system that is mounted to be read
        entry = folder / cache_key(sources, tokenizer, shares, _RememberedHashes(folder / "files.json"))
        if (entry / _INDEX).is_file():
            return finished(_read(entry, sources), sources, shares, tokenizer)
    check_folder("cache", folder)
    with _lock(folder / ".lock"):
        hashes = _RememberedHashes(folder / "files.json")
        entry = folder / cache_key(sources, tokenizer, shares, hashes)
        hashes.save()
        if not (entry / _INDEX).is_file():
            _build(entry, sources, tokenizer, shares, progress)
    return finished(_read(entry, sources), sources, shares, tokenizer)


def cache_key(sources: Sources, tokenizer: Tokenizer, shares: Mapping[str, float], hash_file: FileHash) -> str:
    """Return the name of a cache's entry: a hash of all that its tokens depend on.

    Args:
        sources: Of the corpus.
        tokenizer: Turns text into token ids.
        shares: Of each split in the divided sources.
        hash_file: Hashes the content of a file.
    """
    state = hashlib.blake2b(digest_size=12)
    state.update(json.dumps([FORMAT, describe(tokenizer), shares]).encode())
    for split, parts in sources.items():
        for source in parts:
            state.update(f"{split} {type(source).__qualname__}\n{source.fingerprint(hash_file)}\0".encode())
    return state.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    entry: Path, sources: Sources, tokenizer: Tokenizer, shares: Mapping[str, float], progress: Progress | None
) -> None:
    partial = entry.with_name(f"{entry.name}.partial")
    partial.mkdir(exist_ok=True)
    state = _progress(partial)
    if state is None:
        shutil.rmtree(partial)
        partial.mkdir()
        splits = splits_of(sources, shares)
        state = {"segments": 0, "pieces": 0, "bytes": 0}
        state |= {"open": dict.fromkeys(splits, ""), "tokens": dict.fromkeys(splits, 0)}
    sizes = [source.size() for parts in sources.values() for source in parts]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    dtype = token_type(tokenizer.vocab_size)

    def empty() -> dict[str, SplitBuffer]:
        return {split: SplitBuffer(dtype, bytes.fromhex(digest)) for split, digest in state["open"].items()}

    buffers = empty()
    documents = assigned_documents(sources, tokenizer, shares)
    for piece in encode_documents(documents, tokenizer, skip=state["pieces"]):
        buffers[piece.split].add(piece)
        state["pieces"] += 1
        state["bytes"] += piece.num_bytes
        if progress is not None:
            progress(state["bytes"], total)
        if sum(buffer.num_tokens for buffer in buffers.values()) >= SEGMENT:
            _write_segment(partial, state, buffers)
            buffers = empty()
    _write_segment(partial, state, buffers)
    _fill_masks(partial, buffers, state["segments"], np.dtype(dtype).itemsize)
    for number in range(state["segments"]):
        (partial / _SEGMENT_SUMS.format(number)).unlink()
    (partial / _PROGRESS).unlink()
    index: dict[str, Any] = {"dtype": np.dtype(dtype).name, "segments": state["segments"], "digests": {}}
    write_text(partial / _INDEX, json.dumps(index))
    index["digests"] = {split: stream.digest() for split, stream in _read(partial).items()}
    index["skipped"] = [source.skipped for parts in sources.values() for source in parts]
    write_text(partial / _INDEX, json.dumps(index))
    finish_folder(partial, entry)


def _progress(partial: Path) -> dict[str, Any] | None:
    """Return how far a build has come; ``None`` if it has not, or what it has written is damaged."""
    try:
        checksum, written = (partial / _PROGRESS).read_text(encoding="utf-8").split("\n")
        if checksum != f"{zlib.crc32(written.encode()):08x}":
            return None
        state: dict[str, Any] = json.loads(written)
        for number in range(state["segments"]):
            checksums = json.loads((partial / _SEGMENT_SUMS.format(number)).read_text(encoding="utf-8"))
            if any(file_checksum(partial / name) != checksum for name, checksum in checksums.items()):
                return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return state


def _write_segment(folder: Path, state: dict[str, Any], buffers: Mapping[str, SplitBuffer]) -> None:
    """Write what was read since the last segment, and then how far that is."""
    number, checksums = state["segments"], dict[str, int]()
    for split, buffer in buffers.items():
        arrays: dict[str, npt.NDArray[Any]] = {"tokens": buffer.tokens()}
        arrays["starts"] = np.array(buffer.starts, dtype=np.int64) + state["tokens"][split]
        arrays["hashes"] = np.array(buffer.hashes, dtype=np.uint64)
        if buffer.masked:
            arrays["mask"] = buffer.mask()
        for kind, array in arrays.items():
            path = folder / f"{split}.{number:05}.{kind}"
            checksums[path.name] = zlib.crc32(array.view(np.uint8).data)
            with atomic_file(path) as file:
                array.tofile(file)
        names = "".join(f"{json.dumps(name)}\n" for name in buffer.names)
        write_text(folder / f"{split}.{number:05}.names", names)
        checksums[f"{split}.{number:05}.names"] = zlib.crc32(names.encode())
        state["open"][split] = buffer.open_digest.hex()
        state["tokens"][split] += buffer.num_tokens
    write_text(folder / _SEGMENT_SUMS.format(number), json.dumps(checksums))
    state["segments"] += 1
    written = json.dumps(state)
    write_text(folder / _PROGRESS, f"{zlib.crc32(written.encode()):08x}\n{written}")


def _read(entry: Path, complete: Sources | None = None) -> dict[str, TokenStream]:
    """Return the streams of an entry, memory-mapped; tell the sources of a complete one what they left out."""
    try:
        checksums = expected_checksums(entry) if complete is not None else {}
        if complete is not None and _INDEX not in checksums:
            refuse("cache", f"{entry} is damaged (its list of checksums); remove it, and it is built again.")
        for name, checksum in checksums.items():  # an empty file is none of an array's
            if not (entry / name).is_file() or (checksum and not (entry / name).stat().st_size):
                refuse(
                    "cache",
                    f"{entry / name} is damaged (it is empty or missing); remove {entry}, and it is built again.",
                )
        index = json.loads(read_checked(entry / _INDEX, checksums))
        numbers = range(int(index["segments"]))
        splits = [file.name.split(".")[0] for file in sorted(entry.glob("*.00000.tokens"))]
        ordered = [split for split in ("train", "val", "test") if split in splits]
        for source, skipped in zip(
            (source for parts in (complete or {}).values() for source in parts), index.get("skipped", ()), strict=False
        ):
            source.skipped = skipped
        dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[index["dtype"]])
        return {
            split: _stream(entry, split, numbers, dtype, index["digests"].get(split), checksums) for split in ordered
        }
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        refuse("cache", f"{entry} is damaged ({error!s:.100}); remove it, and it is built again.")


def _stream(
    entry: Path, split: str, numbers: Sequence[int], dtype: Any, digest: str | None, checksums: Mapping[str, int]
) -> TokenStream:
    def files(kind: str) -> list[Path]:
        return [entry / f"{split}.{number:05}.{kind}" for number in numbers]

    def array(kind: str, dtype: Any) -> ShardedArray:
        return ShardedArray(files(kind), dtype, checksums=checksums)

    masked = files("mask")[0].is_file()
    starts = array("starts", np.int64).whole()
    return TokenStream(
        array("tokens", dtype),
        starts,
        _Names(files("names"), len(starts), checksums),
        array("mask", np.bool_) if masked else None,
        array("hashes", np.uint64).whole(),
        known_digest=digest,
    )


def _fill_masks(folder: Path, splits: Iterable[str], segments: int, itemsize: int) -> None:
    """Give every segment of a split a loss mask where one has one."""
    for split in splits:
        files = [folder / f"{split}.{number:05}.mask" for number in range(segments)]
        for file in files if any(file.is_file() for file in files) else []:
            if not file.is_file():
                count = file.with_suffix(".tokens").stat().st_size // itemsize
                with atomic_file(file) as partial:
                    np.ones(count, dtype=bool).tofile(partial)
