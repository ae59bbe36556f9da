"""Files of tokenized documents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_modules.core.checks import refuse
from mtp_modules.core.saving import atomic_file

SUFFIX = ".bin"
_DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


def write_documents(path: Path, documents: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    """Write ``NAME.bin`` with all ids, and ``NAME.json`` with the starts of the documents, each atomically.

    Args:
        path: Ends in ``.bin``.
        documents: Token ids.
        vocab_size: Number ``V`` of token ids; decides between 16 and 32 bits.

    Raises:
        ValueError: If the name does not end in ``.bin``, or there is no document.
    """
    if path.suffix != SUFFIX:
        refuse("write_documents", f"a file of tokens must end in {SUFFIX}, got {path.name!r}.")
    if not documents:
        refuse("write_documents", "there is no document to write; give at least one.")
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    lengths = np.array([len(document) for document in documents])
    index = {
        "dtype": np.dtype(dtype).name,
        "vocab_size": vocab_size,
        "num_tokens": int(lengths.sum()),
        "document_starts": (lengths.cumsum() - lengths).tolist(),
    }
    described = path.with_suffix(".json")
    described.unlink(missing_ok=True)  # never an old index beside new tokens
    with atomic_file(path) as temporary:
        np.concatenate([np.asarray(document, dtype=dtype) for document in documents]).tofile(temporary)
    with atomic_file(described) as temporary:
        temporary.write_text(json.dumps(index), encoding="utf-8")


def read_documents(path: Path) -> tuple[list[npt.NDArray[np.unsignedinteger[Any]]], int]:
    """Return the documents that :func:`write_documents` wrote, memory-mapped, and their number of token ids.

    Args:
        path: Of the ``.bin`` file.

    Raises:
        ValueError: If the index is missing or does not fit the file, or tokens are missing.
    """
    try:
        index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size, dtype = path.stat().st_size, np.dtype(_DTYPES[index["dtype"]])
        count = index.get("num_tokens", size // dtype.itemsize)  # earlier versions did not say how many there are
        needed = count * dtype.itemsize
        tokens = np.memmap(path, dtype=dtype, shape=(min(size, needed) // dtype.itemsize,), mode="r")
        starts, vocab_size = index["document_starts"], index["vocab_size"]
        if not starts or starts[0] != 0 or sorted(starts) != starts or starts[-1] > count:
            raise ValueError
        if not all(type(number) is int for number in (*starts, vocab_size, count)) or not 0 < vocab_size <= 2**32:
            raise ValueError
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        refuse(
            "TokenFiles",
            f"{path} needs {path.with_suffix('.json').name} beside it, both as the command sample wrote them.",
        )
    if size != needed:
        refuse(
            "TokenFiles",
            f"{path} has {size} bytes, but its index says {needed}: it was cut off or changed; write it again with the "
            "command sample.",
        )
    return np.split(tokens, starts[1:]), vocab_size
