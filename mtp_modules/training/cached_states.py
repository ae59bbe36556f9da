"""Compute the hidden states of a frozen trunk once for the training rows, and cache them on disk."""

import hashlib
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Trunk
from mtp_modules.core.saving import atomic_file
from mtp_modules.core.shapes import Tensor
from mtp_modules.data.cached_states import DTYPES, CachedRows, CachedStates
from mtp_modules.data.module import TokenDataModule

_BLOCK = 32
"""Windows that share a checksum, and are read again together."""


def read_cached_rows(trainer: Trainer, trunk: Trunk) -> None:
    """Fill the hidden-state cache of a run's training rows, and attach it to the rows.

    Process 0 writes the missing states, and the others wait for it. The trunk runs in the trainer's precision.

    Args:
        trainer: Of the run. Without cached states in its data, nothing is done.
        trunk: On its device, with the weights that it will have in the run.

    Raises:
        ValueError: See :func:`read_once`.
    """
    data = getattr(trainer, "datamodule", None)
    rows = data.training_rows() if isinstance(data, TokenDataModule) else None
    if not isinstance(rows, CachedRows):
        return
    if not trainer.is_global_zero:
        trainer.strategy.barrier("cached states")
    with trainer.precision_plugin.forward_context():  # as in a training step
        read_once(rows, trunk, writes=trainer.is_global_zero)
    if trainer.is_global_zero:
        trainer.strategy.barrier("cached states")


def read_once(rows: CachedRows, trunk: Trunk, *, writes: bool = True) -> None:
    """Write the missing hidden states of the rows to disk, and attach all of them to the rows.

    Every block of windows has a checksum. States that do not match theirs, because a disk lost or damaged them, are
    computed again, and a line says so.

    Args:
        rows: Changed in place.
        trunk: Frozen.
        writes: Whether this process writes; others wait before they call.

    Raises:
        ValueError: If the trunk is trained, the folder holds other states or a damaged index, the disk is full, a state
            is not finite in the precision of the cache, or this process does not see what process 0 wrote.
    """
    kept, layers = rows.kept, list(trunk.feature_layers)
    if any(parameter.requires_grad for parameter in trunk.parameters()):
        refuse(kept, "the trunk is trained, so its hidden states change; freeze it (model.freeze: [trunk]).")
    shape = [rows.num_rows, 1 + len(layers), rows.window, trunk.d_model]
    key = {"of": _fingerprint(rows, trunk), "read_in": _precision(trunk), "dtype": kept.dtype, "shape": shape}
    key["feature_layers"] = layers
    kept.folder.mkdir(parents=True, exist_ok=True)
    known = _read_index(kept, key)
    path, dtype = kept.folder / "states.bin", DTYPES[kept.dtype]
    size = math.prod(shape) * dtype.itemsize
    if writes:
        _allocate(kept, path, size)
    elif not path.is_file() or path.stat().st_size != size or known["written"] != rows.num_rows:
        refuse(kept, f"this process does not see in {kept.folder} what process 0 wrote; name a folder that all share.")
    states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    if writes:
        _fill(rows, trunk, states, known)
    rows.hold(states)


def _read_index(kept: CachedStates, key: dict[str, Any]) -> dict[str, Any]:
    """Return what the folder says of its states; nothing written if it is new."""
    index, empty = _index(kept), {**key, "written": 0, "checksums": {}}
    if not index.is_file():
        return empty
    try:
        known = dict(json.loads(index.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        refuse(kept, f"{index} is damaged, so nothing says whose states these are; delete {kept.folder}.")
    if {name: known.get(name) for name in key} != key:
        refuse(
            kept,
            f"{kept.folder} holds the states of another trunk, other layers, text, windows or precision; name another "
            "folder, or delete it.",
        )
    if type(known.get("written")) is not int or not 0 <= known["written"] <= key["shape"][0]:
        refuse(kept, f"{index} is damaged: written is {known.get('written')!r:.40}; delete {kept.folder}.")
    unproved = dict.fromkeys(map(str, range(0, known["written"], _BLOCK)))  # of a version without checksums
    return {**empty, "checksums": unproved, **known}


def _index(kept: CachedStates) -> Path:
    return kept.folder / "index.json"


def _allocate(kept: CachedStates, path: Path, size: int) -> None:
    """Make the file as large as needed, on disk and not only in name: writing to a mapped hole of a full disk kills."""
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("ab") as file:
            file.truncate(min(before, size))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(kept.folder).free < size - before:
                raise OSError
            else:
                file.truncate(size)
    except OSError:
        if path.is_file():
            os.truncate(path, min(before, size))
        refuse(
            kept,
            f"the states need {size / 1e9:.3g} GB, but {kept.folder} has no room for them "
            f"({shutil.disk_usage(kept.folder).free / 1e9:.3g} GB are free); name a folder on another disk, or set "
            "max_windows.",
        )


@torch.no_grad()
def _fill(rows: CachedRows, trunk: Trunk, states: Tensor, known: dict[str, Any]) -> None:
    """Write the blocks that are missing or damaged, and save the progress after each."""
    kept, checksums = rows.kept, known["checksums"]
    blocks = range(0, rows.num_rows, _BLOCK)
    known_blocks = [start for start in blocks if str(start) in checksums]
    damaged = [start for start in known_blocks if checksums[str(start)] != _checksum(states[start : start + _BLOCK])]
    missing = [start for start in blocks if str(start) not in checksums or start in damaged]
    if damaged:
        lost = sum(len(states[start : start + _BLOCK]) for start in damaged)
        print(
            f"CachedStates: {lost} of {len(states)} windows in {kept.folder} are missing or damaged; the trunk reads "
            "them again.",
            file=sys.stderr,
            flush=True,
        )
    was_training, done = trunk.training, len(states) - sum(len(states[start : start + _BLOCK]) for start in missing)
    trunk.eval()
    for start in missing:
        block = states[start : start + _BLOCK]
        _compute(rows, trunk, block, start)
        with (kept.folder / "states.bin").open("rb+") as file:
            os.fsync(file.fileno())  # before the index claims that they are there
        done += len(block)
        checksums[str(start)] = _checksum(block)
        with atomic_file(_index(kept)) as temporary:
            temporary.write_text(json.dumps({**known, "written": done}), encoding="utf-8")
        print(f"CachedStates: {done} of {len(states)} windows in {kept.folder}", file=sys.stderr, flush=True)
    trunk.train(was_training)


def _compute(rows: CachedRows, trunk: Trunk, states: Tensor, start: int) -> None:
    """Run the trunk on the windows of a block."""
    kept, device = rows.kept, next(trunk.parameters()).device
    ids = rows.fixed_ids()[start : start + len(states)]
    for first in range(0, len(ids), kept.rows_per_pass):
        batch = rows.source.batch(ids[first : first + kept.rows_per_pass])
        given = {name: tensor[:, : rows.window].to(device) for name, tensor in batch.items()}
        output = trunk(given["tokens"], document_ids=given.get("document_ids"))
        computed = torch.stack((output.hidden, *output.features), dim=1).to(states.dtype)
        if not computed.isfinite().all():
            refuse(kept, f"a hidden state is too large for {kept.dtype}, or no number; try float32.")
        states[first : first + len(computed)] = computed.cpu()


def _checksum(states: Tensor) -> int:
    return zlib.crc32(states.flatten().view(torch.uint8).numpy().data)


def _precision(trunk: nn.Module) -> str:
    """Return the name of the precision of the trunk's matrix products."""
    weight = next(trunk.parameters())
    device = weight.device.type
    found = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return str(found).removeprefix("torch.")


def _fingerprint(rows: CachedRows, trunk: nn.Module) -> str:
    """Return a hash of the text, the windows and the trunk's weights."""
    state = hashlib.blake2b(rows.source.digest().encode(), digest_size=16)
    state.update(rows.fixed_ids().tobytes())
    for name, tensor in sorted(trunk.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
