"""Held-out text for a checkpoint: from its own run, from another configuration, or from files."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import get_loader
from lightning.pytorch import LightningDataModule

from mtp_modules.configuration import assemble_data
from mtp_modules.core.budget import named_values
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.shapes import Tensor
from mtp_modules.data import TextDataModule
from mtp_modules.data.loaders import EvalLoader
from mtp_modules.data.prompts import row_beginnings
from mtp_modules.loading import find_checkpoint
from mtp_modules.model import MTPModel

_WINDOW, _BATCH_SIZE = 256, 8
_SPLITS = {"val": "validate", "test": "test", "all": "fit"}
_PACKAGE = __name__.partition(".")[0]
_NAMES = ("pretrained", "gguf_file", "revision", "ckpt_path", "dict_kwargs", "dataset", "cache", "cache_dir")
_KEYS = ("tokens", "document_ids", "loss_mask")


def data_for(
    model: MTPModel,
    tokenizer: Tokenizer | None,
    ckpt_path: str,
    *,
    data: str | None,
    sources: list[str] | None,
    split: str,
) -> LightningDataModule:
    """Build the data module that the options of a command describe.

    Args:
        model: The model; its lookahead and vocabulary size are those of the data.
        tokenizer: Tokenizer of the checkpoint.
        ckpt_path: Path of the checkpoint, whose run may have stored its configuration there.
        data: Path of a configuration of ``fit`` with a ``data`` section.
        sources: Files, folders or patterns to read instead.
        split: ``val`` or ``test``; ``all`` reads every file of ``sources``.

    Raises:
        ValueError: If both or neither of ``data`` and ``sources`` are given where one is required, if the split does
            not exist, or if the data section is invalid.
    """
    if split not in _SPLITS:
        refuse("diagnose", f"split must be val or test, which the model was not trained on, or all, got {split!r}.")
    if split == "all" and sources is None:
        refuse("diagnose", "split=all reads every file of sources; give sources that the model was not trained on.")
    if data is not None and sources is not None:
        refuse("diagnose", "data and sources exclude each other; give one of them.")
    if sources is not None:
        if tokenizer is None:
            refuse("sources", "this model has no tokenizer for text files; give data, a configuration, instead.")
        make = partial(
            TextDataModule,
            sources=list(sources),
            window=_WINDOW if model.trunk.max_positions is None else min(_WINDOW, model.trunk.max_positions),
            lookahead=model.lookahead,
            batch_size=_BATCH_SIZE,
            tokenizer=tokenizer,
        )
        return make(val_share=0.0, test_share=0.0) if split == "all" else make()
    if data is not None:
        return _from_configuration(Path(data), model, given=True)
    if (configuration := _configuration_of(ckpt_path)) is not None:
        return _from_configuration(configuration, model, given=False)
    refuse(
        "diagnose",
        f'{ckpt_path} has no config.yaml with its data; give sources, such as "[stdlib]", or data, a configuration of '
        "fit.",
    )


def data_section(ckpt_path: str) -> dict[str, Any] | None:
    """Return what the configuration of a checkpoint's run says of its data; ``None`` if it lies in no run's folder.

    Args:
        ckpt_path: Path of the checkpoint.
    """
    path = _configuration_of(ckpt_path)
    return None if path is None else _section(path)


def _configuration_of(ckpt_path: str) -> Path | None:
    """Return the configuration of the run that saved a checkpoint."""
    found = find_checkpoint(ckpt_path)
    run = found if found.is_dir() else found.parent
    folders = (run, run.parent) if run.name == "checkpoints" else (run,)
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)


def _section(path: Path) -> dict[str, Any] | None:
    """Return the data section of a configuration; ``None`` if it has none."""
    try:
        configuration = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except Exception:  # parsing a file that is not YAML can raise any exception
        configuration = None
    section = configuration.get("data") if isinstance(configuration, dict) else None
    section = {"class_path": section} if isinstance(section, str) else section
    return section if isinstance(section, dict) and "class_path" in section else None


def _from_configuration(path: Path, model: MTPModel, *, given: bool) -> LightningDataModule:
    """Build the data of a configuration; one that was found, not given, may only name classes of this package."""
    if not path.is_file():
        refuse("data", f"{path} does not exist; give a configuration of fit with a data section.")
    if (section := _section(path)) is None:
        refuse("data", f"{path} has no data section with a class_path; give a configuration of fit.")
    if not given:
        _check_found(path, section)
    return assemble_data(section, lookahead=model.lookahead, vocab_size=model.trunk.vocab_size)


def _check_found(path: Path, section: dict[str, Any]) -> None:
    """Raise an error for a configuration that came with a checkpoint, and names code or models of others."""
    for name, value in named_values("data", section):
        foreign = name == "class_path" and "." in str(value) and not str(value).startswith(f"{_PACKAGE}.")
        remote = isinstance(value, str) and "://" in value
        if value is not None and (foreign or remote or name in _NAMES):
            refuse(
                "data",
                f"{path} came with the checkpoint and names {name}={value!r:.100}; if you trust it, give data={path}.",
            )


def held_out_batches(data: LightningDataModule, split: str, rows: int) -> list[dict[str, Tensor]]:
    """Return batches of a held-out split, evenly spaced over it.

    Args:
        data: The data module.
        split: ``val`` or ``test``; ``all`` for a :class:`~mtp_modules.data.TextDataModule` without splits.
        rows: Approximate number of rows; batches are not cut.

    Raises:
        ValueError: If the split is empty, or its batches contain no tokens.
    """
    at_least("diagnose", "rows", rows, 1)
    data.prepare_data()
    data.setup(_SPLITS[split])
    loaders: Any
    if split == "all":
        assert isinstance(data, TextDataModule)
        windows = data.rows("train")
        assert windows is not None
        loaders = EvalLoader(rows=windows, batch_size=data.batch_size, limit=rows, rank=0, world_size=1, num_workers=0)
    else:
        loaders = data.val_dataloader() if split == "val" else data.test_dataloader()
    batches = []
    for loader in loaders if isinstance(loaders, Sequence) else [loaders]:
        batches += _spread(loader, rows)
    if not batches:
        refuse("diagnose", f"the {split} split of {type(data).__name__} is empty; use the other split, or other data.")
    for batch in batches:
        if not isinstance(batch, dict) or not isinstance(batch.get("tokens"), torch.Tensor):
            refuse("diagnose", f"{type(data).__name__} must return batches with tokens, as for fit.")
    return [{name: batch[name] for name in _KEYS if name in batch} for batch in batches]


def _spread(loader: Any, rows: int) -> list[Any]:
    """Return as many whole batches as contain the rows."""
    size = len(loader) if hasattr(loader, "__len__") else None
    taken: list[Any] = []
    every, got = 1, 0
    for index, batch in enumerate(loader):
        width = len(batch["tokens"]) if isinstance(batch, dict) and "tokens" in batch else 1
        if index == 0 and size is not None:
            every = max(1, size // max(1, -(-rows // width)))
        if index % every == 0:
            taken.append(batch)
            got += width
        if got >= rows:
            break
    return taken


def prompts_of(batches: Sequence[dict[str, Tensor]], count: int, length: int) -> list[list[int]]:
    """Return the beginnings of rows as prompts, evenly spaced, each within one document.

    Args:
        batches: Batches of held-out text.
        count: Largest number of prompts.
        length: Largest number of tokens of a prompt; half a row if that is less.

    Raises:
        ValueError: If a number is below 1, or no row begins with enough tokens of one document.
    """
    at_least("diagnose", "prompts", count, 1)
    at_least("diagnose", "prompt_length", length, 1)
    length = min(length, max(1, batches[0]["tokens"].shape[1] // 2))
    found = list(row_beginnings(batches, length=length))
    if not found:
        refuse("diagnose", f"no row begins with {length} tokens of one document; give a shorter prompt_length.")
    step = len(found) / min(count, len(found))
    return [found[int(index * step)] for index in range(min(count, len(found)))]
