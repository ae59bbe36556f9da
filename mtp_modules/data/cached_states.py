"""The hidden states of a frozen trunk, read once and kept on disk."""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Trunk
from mtp_modules.core.shapes import Tensor
from mtp_modules.data.rows import IntArray, TokenRows, evenly_spread

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAVED_EVERY = 8


class CachedStates(Component):
    """Where the training windows' hidden states are kept, so that heads are trained without running the trunk again.

    For a frozen trunk only. The first run writes them, window by window, and goes on where it was stopped; later runs,
    of any heads, read them from a memory-mapped file. Batches carry them as ``hidden``, and those of the trunk's
    ``feature_layers``, if it names any, as ``features``. The trunk reads in the trainer's precision: ``bf16-mixed`` is
    faster where the processor multiplies bfloat16. A folder belongs to one trunk, its feature layers, one text, one cut
    of it, and one such precision.

    Args:
        folder: Made if it is not there.
        dtype: Precision on disk: ``float16``, ``bfloat16`` or ``float32``.
        max_windows: Train on at most so many windows, evenly spread over the text; all if ``None``.
        rows_per_pass: Windows that the trunk reads at once.

    Raises:
        ValueError: If the precision is unknown or a number below 1.
    """

    def __init__(
        self, *, folder: str, dtype: str = "float16", max_windows: int | None = None, rows_per_pass: int = 4
    ) -> None:
        if dtype not in DTYPES:
            refuse(self, f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if max_windows is not None:
            at_least(self, "max_windows", max_windows, 1)
        at_least(self, "rows_per_pass", rows_per_pass, 1)
        self.folder, self.dtype, self.max_windows, self.rows_per_pass = Path(folder), dtype, max_windows, rows_per_pass

    def rows(self, rows: TokenRows, trunk: Trunk, *, window: int, writes: bool = True) -> "CachedRows":
        """Return rows whose batches carry hidden states; write what is missing on disk.

        Args:
            rows: The training rows.
            trunk: Frozen.
            window: Positions ``T`` of a row that it reads.
            writes: Whether this process writes; others wait before they call.

        Raises:
            ValueError: If the trunk is trained, the folder holds states of something else, or a state cannot be held in
                the precision.
        """
        if any(parameter.requires_grad for parameter in trunk.parameters()):
            refuse(self, "the trunk is trained, so its hidden states change; freeze it (model.freeze: [trunk]).")
        ids = evenly_spread(rows.fixed_ids(), self.max_windows)
        layers = list(trunk.feature_layers)
        shape = [len(ids), 1 + len(layers), window, trunk.d_model]
        index, path = self.folder / "index.json", self.folder / "states.bin"
        told = {"of": _fingerprint(rows, trunk, ids), "read_in": _precision(trunk), "dtype": self.dtype, "shape": shape}
        told["feature_layers"] = layers
        self.folder.mkdir(parents=True, exist_ok=True)
        known: dict[str, Any] = {**told, "written": 0}
        if index.is_file():
            known = json.loads(index.read_text(encoding="utf-8"))
        if {name: known.get(name) for name in told} != told:
            refuse(
                self,
                f"{self.folder} holds the states of another trunk, other layers, text, cut or precision; name another "
                "folder, or delete it.",
            )
        states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=DTYPES[self.dtype]).view(shape)
        if writes and known["written"] < len(ids):
            self._write(rows, trunk, ids, states, known, index)
        return CachedRows(rows, ids, states)

    @torch.no_grad()
    def _write(
        self, rows: TokenRows, trunk: Trunk, ids: IntArray, states: Tensor, known: dict[str, Any], index: Path
    ) -> None:
        """Fill in what is missing, and note how far that has come."""
        was_training, device = trunk.training, next(trunk.parameters()).device
        trunk.eval()
        done, window = known["written"], states.shape[2]
        for turn, start in enumerate(range(done, len(ids), self.rows_per_pass), start=1):
            batch = rows.batch(ids[start : start + self.rows_per_pass])
            given = {name: tensor[:, :window].to(device) for name, tensor in batch.items()}
            output = trunk(given["tokens"], document_ids=given.get("document_ids"))
            said = torch.stack((output.hidden, *output.features), dim=1).to(states.dtype)
            if not said.isfinite().all():
                refuse(self, f"a hidden state is too large for {self.dtype}, or no number; try float32.")
            end = start + len(said)
            states[start:end] = said.cpu()
            if turn % _SAVED_EVERY == 0 or end == len(ids):
                index.write_text(json.dumps({**known, "written": end}), encoding="utf-8")
                print(f"CachedStates: {end} of {len(ids)} windows in {self.folder}", file=sys.stderr, flush=True)
        trunk.train(was_training)


class CachedRows(TokenRows):
    """Rows with the hidden states of a frozen trunk beside them.

    Args:
        rows: Where tokens come from.
        ids: Which rows of them, ascending.
        states: ``(rows, 1 + F, T, D)``: the last state, then those of the feature layers.
    """

    def __init__(self, rows: TokenRows, ids: IntArray, states: Tensor) -> None:
        self._rows, self._ids, self._states, self.num_rows = rows, ids, states, len(ids)

    def epoch_ids(self, generator: np.random.Generator) -> IntArray:
        """Shuffle."""
        return generator.permutation(self._ids)

    def fixed_ids(self) -> IntArray:
        """Return the ids in order."""
        return self._ids

    def batch(self, ids: IntArray) -> dict[str, Tensor]:
        """Return tokens, ``hidden`` ``(B, T, D)``, and ``features`` ``(B, F, T, D)``, in the precision on disk."""
        states = self._states[torch.from_numpy(np.searchsorted(self._ids, ids))]
        batch = {**self._rows.batch(ids), "hidden": states[:, 0]}
        return {**batch, "features": states[:, 1:]} if states.shape[1] > 1 else batch

    def digest(self) -> str:
        """Return a hash of the rows and of which they are."""
        return hashlib.blake2b(f"{self._rows.digest()}{self._ids.tolist()}".encode(), digest_size=16).hexdigest()


def _precision(trunk: nn.Module) -> str:
    """Return the name of the precision that matrix products of the trunk are made in."""
    weight = next(trunk.parameters())
    device = weight.device.type
    found = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return str(found).removeprefix("torch.")


def _fingerprint(rows: TokenRows, trunk: nn.Module, ids: IntArray) -> str:
    """Return a hash of the text, the windows and the trunk's weights."""
    state = hashlib.blake2b(rows.digest().encode(), digest_size=16)
    state.update(ids.tobytes())
    for name, tensor in sorted(trunk.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
