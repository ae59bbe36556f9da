"""Compute the hidden states of a frozen trunk once for the training rows, and cache them on disk."""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Trunk
from mtp_modules.core.shapes import Tensor
from mtp_modules.data.cached_states import DTYPES, CachedRows, CachedStates
from mtp_modules.data.module import TokenDataModule

_SAVED_EVERY = 8


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

    Args:
        rows: Changed in place.
        trunk: Frozen.
        writes: Whether this process writes; others wait before they call.

    Raises:
        ValueError: If the trunk is trained, the folder holds other states, or a state is not finite in the
            precision of the cache.
    """
    kept, layers = rows.kept, list(trunk.feature_layers)
    if any(parameter.requires_grad for parameter in trunk.parameters()):
        refuse(kept, "the trunk is trained, so its hidden states change; freeze it (model.freeze: [trunk]).")
    shape = [rows.num_rows, 1 + len(layers), rows.window, trunk.d_model]
    key = {"of": _fingerprint(rows, trunk), "read_in": _precision(trunk), "dtype": kept.dtype, "shape": shape}
    key["feature_layers"] = layers
    index = kept.folder / "index.json"
    known: dict[str, Any] = {**key, "written": 0}
    kept.folder.mkdir(parents=True, exist_ok=True)
    if index.is_file():
        known = _read_index(kept, index)
    if {name: known.get(name) for name in key} != key:
        refuse(
            kept,
            f"{kept.folder} holds the states of another trunk, other layers, text, windows or precision; name another "
            "folder, or delete it.",
        )
    path, dtype = str(kept.folder / "states.bin"), DTYPES[kept.dtype]
    written = known["written"]
    if type(written) is not int or not 0 <= written <= rows.num_rows:
        refuse(kept, f"{index} is damaged: written is {written!r:.40}; delete {kept.folder}.")
    if written and (not Path(path).is_file() or Path(path).stat().st_size != math.prod(shape) * dtype.itemsize):
        refuse(kept, f"{path} is not as long as {index} says; delete {kept.folder}.")
    states = torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    if writes and written < rows.num_rows:
        _write(rows, trunk, states, known, index)
    rows.hold(states)


def _read_index(kept: CachedStates, index: Path) -> dict[str, Any]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "written" not in found:
        refuse(kept, f"{index} is damaged; delete {kept.folder}.")
    return found


@torch.no_grad()
def _write(rows: CachedRows, trunk: Trunk, states: Tensor, known: dict[str, Any], index: Path) -> None:
    """Write the missing states, and save the progress."""
    was_training, device = trunk.training, next(trunk.parameters()).device
    trunk.eval()
    kept, ids = rows.kept, rows.fixed_ids()
    for turn, start in enumerate(range(known["written"], len(ids), kept.rows_per_pass), start=1):
        batch = rows.source.batch(ids[start : start + kept.rows_per_pass])
        given = {name: tensor[:, : rows.window].to(device) for name, tensor in batch.items()}
        output = trunk(given["tokens"], document_ids=given.get("document_ids"))
        computed = torch.stack((output.hidden, *output.features), dim=1).to(states.dtype)
        if not computed.isfinite().all():
            refuse(kept, f"a hidden state is too large for {kept.dtype}, or no number; try float32.")
        end = start + len(computed)
        states[start:end] = computed.cpu()
        if turn % _SAVED_EVERY == 0 or end == len(ids):
            index.write_text(json.dumps({**known, "written": end}), encoding="utf-8")
            print(f"CachedStates: {end} of {len(ids)} windows in {kept.folder}", file=sys.stderr, flush=True)
    trunk.train(was_training)


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
