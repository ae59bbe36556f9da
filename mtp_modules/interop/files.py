"""Read and write the files of foreign formats, whole or not at all."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor

WEIGHTS, INDEX, CONFIG, SIDECAR = "model.safetensors", "model.safetensors.index.json", "config.json", "mtp_modules.json"
_OUR_SHARD = re.compile(r"model-mtp-[0-9a-f]{12}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(owner: str, path: Path) -> dict[str, Any]:
    """Read an object.

    Args:
        owner: Name of the format.
        path: Of the file.

    Raises:
        ValueError: If it is not there, or holds something else.
    """
    if not path.is_file():
        refuse(owner, f"{path.parent} has no {path.name}; give the folder of a whole checkpoint.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        refuse(owner, f"{path} is damaged: it holds no JSON object.")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object so that a reader sees all of it or what was there before.

    Args:
        path: Of the file.
        content: Plain values.
    """
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors so that a reader sees all of them or what was there before.

    Args:
        path: Of the file.
        tensors: May share memory; each is written for itself.
    """
    beside = path.with_name(f".{path.name}.tmp")
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, beside, {"format": "pt"})
    os.replace(beside, path)


def read_tensors(owner: str, folder: Path, weights: str = WEIGHTS) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, of one file or of shards with an index.

    Args:
        owner: Name of the format.
        folder: Of the checkpoint.
        weights: Name of the file, if it is one.

    Raises:
        ValueError: If a file is missing or damaged, is a pickle, or the index and the shards do not agree.
    """
    index = folder / INDEX
    single = folder / weights
    if single.is_file() and index.is_file() and weights == WEIGHTS:
        refuse(owner, f"{folder} has both {WEIGHTS} and {INDEX}, and readers differ in which they take; remove one.")
    if single.is_file():
        return _read_file(owner, single)
    if not index.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            refuse(
                owner,
                f"{folder} has {pickles[0]}, a pickle, where {weights} is meant, and pickles can run code; read it "
                "with torch.load(..., weights_only=True), and write it as safetensors.",
            )
        refuse(owner, f"{folder} has no {weights}; give the folder of a whole checkpoint.")
    places = read_json(owner, index).get("weight_map", {})
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            refuse(owner, f"{index} names {shard}, which is not there: this is half a checkpoint; fetch the rest.")
        tensors = _read_file(owner, folder / shard)
        named = {name for name, place in places.items() if place == shard}
        if tensors.keys() != named:
            name = sorted(tensors.keys() ^ named)[0]
            refuse(owner, f"{index} and {shard} disagree about {name}; fetch both again.")
        found |= tensors
    return found


def _read_file(owner: str, path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        refuse(owner, f"{path} is not safetensors (a pickle under that name?), or is damaged ({error}).")


def read_pickle(owner: str, path: Path) -> dict[str, Tensor]:
    """Read a state dict that a format keeps as a pickle, unpickling nothing but tensors.

    Args:
        owner: Name of the format.
        path: Of the file.

    Raises:
        ValueError: If it is not there, or holds anything else.
    """
    if not path.is_file():
        refuse(owner, f"{path.parent} has no {path.name}; give the folder of a whole checkpoint.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what is no pickle makes an unpickler fail in any way
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        refuse(owner, f"{path} is damaged, or holds more than tensors, which is never unpickled; give a state dict.")
    return found


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict for a format that keeps it as a pickle, whole or not at all.

    Args:
        path: Of the file.
        tensors: The state dict.
    """
    beside = path.with_name(f".{path.name}.tmp")
    torch.save({name: value.detach().clone().contiguous() for name, value in tensors.items()}, beside)
    os.replace(beside, path)


def new_folder(owner: str, folder: Path) -> None:
    """Make a folder.

    Args:
        owner: Who needs it.
        folder: May be there, if it is empty.

    Raises:
        ValueError: If something lies in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(owner, f"out ({folder}) is there already and not empty; give a new folder, or add=true to add heads.")
    folder.mkdir(parents=True, exist_ok=True)


def add_tensors(owner: str, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Add a shard to a checkpoint, or replace the one that was added before; every other shard stays as it is.

    A reader sees the checkpoint with or without the new tensors, never a part of it.

    Args:
        owner: Name of the format.
        folder: With one file or with shards and their index.
        tensors: What to add.

    Raises:
        ValueError: If there is no checkpoint, or a name is there already.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if index.is_file() and not single.is_file():
        content = read_json(owner, index)
    elif single.is_file() and not index.is_file():
        content = {"metadata": {}, "weight_map": dict.fromkeys(_read_file(owner, single), "model-trunk.safetensors")}
    else:
        refuse(owner, f"{folder} must have either {WEIGHTS} or {INDEX}; give the folder of a whole checkpoint.")
    places: dict[str, str] = content["weight_map"]
    ours = {shard for shard in places.values() if _OUR_SHARD.fullmatch(shard)}
    kept = {name: shard for name, shard in places.items() if shard not in ours}
    if clash := sorted(kept.keys() & tensors.keys()):
        refuse(owner, f"{folder} has {clash[0]} already, from elsewhere; export to a copy of the model without heads.")
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
    """Write tensors into a file that has its name from their bytes, so that no index names another's; return the name.

    What a run left that died on the way is written over.
    """
    beside = folder / ".model-mtp.safetensors"
    write_tensors(beside, tensors)
    with beside.open("rb") as file:
        shard = f"model-mtp-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}.safetensors"
    os.replace(beside, folder / shard)
    return shard


def _data_bytes(path: Path) -> int:
    """Return how many bytes a safetensors file has behind its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
