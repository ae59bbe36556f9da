"""The two files of a saved model: a reader never sees one model's description with another's weights.

``model.safetensors`` holds the weights and, in its header, a description of the model and a checksum of every tensor.
``config.json`` repeats the description for people and other programs, and names the weights that it belongs to. A save
that is killed between the two files leaves the new weights, which describe themselves.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.checksums import tensor_checksum
from mtp_modules.core.saving import atomic_file, write_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT_KEY = "mtp_modules"
FORMAT = 2
"""Version of the stored weights. It increases when their layout changes but not their shapes."""
_DESCRIPTION, _CHECKSUM, _CHECKSUMS, _BELONGS = "mtp_modules", "checksum", "checksums", "weights"


class SavedModel(NamedTuple):
    """What the files of a folder say of the model, before it is built.

    Attributes:
        config: Format, and descriptions of model and tokenizer; keys that are missing were not checked.
        shapes: Shape of every stored tensor by name.
        dtypes: Types of the stored tensors, as safetensors names them.
        checksums: CRC-32 of every stored tensor by name; empty if an earlier version saved them.
    """

    config: dict[str, Any]
    shapes: dict[str, list[int]]
    dtypes: set[str]
    checksums: dict[str, int]


def write_model(folder: Path, config: dict[str, Any], module: nn.Module) -> None:
    """Write both files.

    Args:
        folder: Created if it does not exist.
        config: Plain values.
        module: Whose weights are written.

    Raises:
        ValueError: If they cannot be written; each file is then the old one or the new one.
    """
    checksums = {name: tensor_checksum(value) for name, value in module.state_dict().items()}
    description = json.dumps({**config, _CHECKSUMS: checksums})
    checksum = _of(description)
    with atomic_file(folder / WEIGHTS) as partial:
        try:
            save_model(module, str(partial), {_DESCRIPTION: description, _CHECKSUM: checksum})
        except SafetensorError as error:  # it has its own error for a write that failed
            raise OSError(str(error)) from error
        check_tensors("saving", partial, checksums)
    write_text(folder / CONFIG, json.dumps({**config, _BELONGS: checksum}, indent=2) + "\n")


def read_model(owner: str, folder: Path) -> SavedModel:
    """Read all but the weights.

    Args:
        owner: Named in error messages.
        folder: With both files.

    Raises:
        ValueError: If a file is missing or damaged, or ``config.json`` is not the one that was saved with the weights.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            refuse(owner, f"{folder} has no {name}; give a folder that save_pretrained wrote.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # neither JSON nor, perhaps, text
        config = None
    if not isinstance(config, dict) or FORMAT_KEY not in config:
        refuse(owner, f"{folder / CONFIG} was not written by save_pretrained.")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: each.get_shape() for name, each in slices.items()}
            dtypes, header = {each.get_dtype() for each in slices.values()}, file.metadata() or {}
    except (RuntimeError, SafetensorError, OSError) as error:
        refuse(owner, f"{folder / WEIGHTS} is damaged ({error}).")
    belongs, own = config.pop(_BELONGS, None), header.get(_DESCRIPTION)
    if own is None and belongs is None:  # of an earlier version
        return SavedModel(config, shapes, dtypes, {})
    if own is None or header.get(_CHECKSUM) != _of(own):
        refuse(owner, f"{folder / WEIGHTS} is damaged: its description is not what was saved.")
    try:
        described = json.loads(own)
        checksums = described.pop(_CHECKSUMS)
        if not isinstance(checksums, dict) or FORMAT_KEY not in described:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        refuse(owner, f"{folder / WEIGHTS} was not written by save_pretrained.")
    if belongs == header[_CHECKSUM] and config != described:
        refuse(
            owner,
            f"{folder / CONFIG} is not what was saved with the weights; restore it, or take {_BELONGS!r} out of it if "
            "you changed it yourself.",
        )
    return SavedModel(config if belongs is None else described, shapes, dtypes, checksums)


def check_format(owner: object, found: object, origin: object) -> None:
    """Raise an error for weights that were stored in another layout.

    Args:
        owner: Named in the error message.
        found: The stored format version.
        origin: Where the weights come from, for the error message.

    Raises:
        ValueError: If it is not :data:`FORMAT`.
    """
    if found != FORMAT:
        refuse(
            owner,
            f"{origin} holds weights of format {found}, this version reads format {FORMAT}; "
            "use the version of mtp_modules that wrote it, or train again.",
        )


def load_pretrained(owner: str, module: nn.Module, folder: Path, checksums: dict[str, int]) -> None:
    """Load the weights of a folder.

    Args:
        owner: Named in error messages.
        module: Gets them.
        folder: Where they are.
        checksums: As :func:`read_model` returned them.

    Raises:
        ValueError: If they are damaged or do not fit.
    """
    check_tensors(owner, folder / WEIGHTS, checksums)
    _check_dtypes(owner, module, folder / WEIGHTS)
    try:
        load_model(module, str(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        refuse(owner, f"{folder / WEIGHTS} does not fit the model in config.json ({error}).")


def _check_dtypes(owner: str, module: nn.Module, path: Path) -> None:
    """Raise an error for whole or complex numbers where a model has real ones, which torch would convert silently."""
    own = module.state_dict()
    with safe_open(path, framework="pt") as file:
        for name in own.keys() & set(file.keys()):
            stored = file.get_slice(name).get_dtype()
            if own[name].is_floating_point() != stored.startswith(("F", "BF")):
                refuse(owner, f"{path}: {name} is stored as {stored}, and the model has {own[name].dtype}.")


def check_tensors(owner: str, path: Path, checksums: dict[str, int]) -> None:
    """Raise an error if a tensor is not the one that was saved.

    Args:
        owner: Named in error messages.
        path: Of a safetensors file.
        checksums: Of the tensors by name; nothing is checked if it is empty.

    Raises:
        ValueError: If a checksum differs, or a tensor has none.
    """
    if not checksums:
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if tensor_checksum(file.get_tensor(name)) != checksums.get(name):
                refuse(owner, f"{path} is damaged: {name} is not what was saved.")


def _of(description: str) -> str:
    return f"{zlib.crc32(description.encode()):08x}"
