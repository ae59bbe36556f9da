"""Read and write the files of foreign formats atomically."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mtp_modules.core.checks import InputError, refuse
from mtp_modules.core.pickles import load_pickle
from mtp_modules.core.saving import atomic_file, save_checkpoint, write_text
from mtp_modules.core.shapes import Tensor

WEIGHTS, INDEX, CONFIG, SIDECAR = "model.safetensors", "model.safetensors.index.json", "config.json", "mtp_modules.json"
_OUR_SHARD = re.compile(r"model-mtp-[0-9a-f]{12}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(owner: str, path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        owner: Name of the format.
        path: Path of the file.

    Raises:
        ValueError: If the file is missing, or does not hold a JSON object.
    """
    if not path.is_file():
        refuse(owner, f"{path.parent} has no {path.name}; give the folder of a complete checkpoint.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        refuse(owner, f"{path} is damaged: it holds no JSON object.")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically: a reader sees the old content or the new one.

    Args:
        path: Path of the file.
        content: Plain values to write.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically: a reader sees the old content or the new one.

    Args:
        path: Path of the file.
        tensors: Tensors by name. They may share memory; each is written separately.
    """
    separate = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    with atomic_file(path) as partial:
        save_file(separate, partial, {"format": "pt"})


def read_tensors(owner: str, folder: Path, weights: str = WEIGHTS) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, from one file or from shards with an index.

    Args:
        owner: Name of the format.
        folder: Folder of the checkpoint.
        weights: Name of the file, if the checkpoint is a single file.

    Raises:
        ValueError: If a file is missing, damaged or a pickle, or if the index and the shards do not agree.
    """
    index = folder / INDEX
    single = folder / weights
    if single.is_file() and index.is_file() and weights == WEIGHTS:
        refuse(owner, f"{folder} has both {WEIGHTS} and {INDEX}, and readers differ in which they read; remove one.")
    if single.is_file():
        return _read_file(owner, single)
    if not index.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            refuse(
                owner,
                f"{folder} has {pickles[0]}, a pickle, instead of {weights}, and pickles can run code; read it "
                "with torch.load(..., weights_only=True), and write it as safetensors.",
            )
        refuse(owner, f"{folder} has no {weights}; give the folder of a complete checkpoint.")
    places = read_json(owner, index).get("weight_map")
    names = places.values() if isinstance(places, dict) else [None]
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        refuse(owner, f"{index} has no weight_map that names files beside it for all tensors; download it again.")
    assert isinstance(places, dict)
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            refuse(owner, f"{index} names {shard}, which is missing; the checkpoint is incomplete, download the rest.")
        tensors = _read_file(owner, folder / shard)
        named = {name for name, place in places.items() if place == shard}
        if tensors.keys() != named:
            name = sorted(tensors.keys() ^ named)[0]
            refuse(owner, f"{index} and {shard} disagree about {name}; download both again.")
        found |= tensors
    return found


def _read_file(owner: str, path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        refuse(owner, f"{path} is not safetensors (a pickle under that name?), or is damaged ({error}).")


def read_pickle(owner: str, path: Path) -> dict[str, Tensor]:
    """Read a state dict that a format stores as a pickle; only tensors are unpickled.

    Args:
        owner: Name of the format.
        path: Path of the file.

    Raises:
        ValueError: If the file is missing, or holds anything but tensors.
    """
    if not path.is_file():
        refuse(owner, f"{path.parent} has no {path.name}; give the folder of a complete checkpoint.")
    try:
        found = load_pickle(owner, path)
    except InputError:
        raise
    except Exception:  # unpickling a file that is not a pickle can raise any exception
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        refuse(owner, f"{path} is damaged, or holds more than tensors, which is never unpickled; give a state dict.")
    return found


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict atomically for a format that stores it as a pickle.

    Args:
        path: Path of the file.
        tensors: The state dict.
    """
    save_checkpoint({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


def new_folder(owner: str, folder: Path) -> None:
    """Create a folder.

    Args:
        owner: Name that the error message begins with.
        folder: Path of the folder. It may exist if it is empty.

    Raises:
        ValueError: If the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(owner, f"out ({folder}) exists and is not empty; give a new folder, or add=true to add heads.")
    folder.mkdir(parents=True, exist_ok=True)


def add_tensors(owner: str, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Add a shard to a checkpoint, or replace the one that was added before; all other shards are unchanged.

    The update is atomic: a reader sees the checkpoint with all new tensors or with none of them.

    Args:
        owner: Name of the format.
        folder: Folder with a single file, or with shards and their index.
        tensors: Tensors to add, by name.

    Raises:
        ValueError: If there is no checkpoint, or a tensor name exists already.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if index.is_file() and not single.is_file():
        content = read_json(owner, index)
    elif single.is_file() and not index.is_file():
        content = {"metadata": {}, "weight_map": dict.fromkeys(_read_file(owner, single), "model-trunk.safetensors")}
    else:
        refuse(owner, f"{folder} must have either {WEIGHTS} or {INDEX}; give the folder of a complete checkpoint.")
    places: dict[str, str] = content["weight_map"]
    ours = {shard for shard in places.values() if _OUR_SHARD.fullmatch(shard)}
    kept = {name: shard for name, shard in places.items() if shard not in ours}
    if clash := sorted(kept.keys() & tensors.keys()):
        refuse(owner, f"{folder} already has {clash[0]} in another shard; export to a copy of the model without heads.")
    shard = _write_shard(folder, tensors)
    if single.is_file():
        _link(single, folder / "model-trunk.safetensors")
    content.setdefault("metadata", {}).pop("total_size", None)
    content["weight_map"] = kept | dict.fromkeys(tensors, shard)
    content["metadata"]["total_size"] = sum(_data_bytes(folder / name) for name in set(content["weight_map"].values()))
    write_json(index, content)
    single.unlink(missing_ok=True)
    for old in ours - {shard}:
        (folder / old).unlink(missing_ok=True)


def _write_shard(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a shard named after the hash of its bytes, so that an old index never names it; return the name.

    Leftovers of an interrupted run are overwritten.
    """
    partial = folder / ".model-mtp.safetensors"
    write_tensors(partial, tensors)
    with partial.open("rb") as file:
        shard = f"model-mtp-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}.safetensors"
    os.replace(partial, folder / shard)
    return shard


def _data_bytes(path: Path) -> int:
    """Return the size in bytes of a safetensors file without its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def _link(source: Path, target: Path) -> None:
    """Create a hard link to a file; copy the file where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
