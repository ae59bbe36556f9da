"""From a configuration to a module and its data: filling in sizes, and rejecting contradictions."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule

# Imported so that their classes can be used by short name in YAML.
import mtp_modules.data
import mtp_modules.heads
import mtp_modules.losses
import mtp_modules.objectives
import mtp_modules.trunks
from mtp_modules.configuration.parser import LightningSentenceParser, SentenceParser
from mtp_modules.core.checks import refuse
from mtp_modules.training import MTPModule

for _name in mtp_modules.data.__all__:  # those that need Lightning are imported lazily
    getattr(mtp_modules.data, _name)

_HEADS = ("model.heads", "model.heads.init_args.heads", "model.heads.init_args.heads.init_args.heads")
"""Heads, and those inside of heads that add something to others."""

LINKS = (
    *(
        (f"model.trunk.{size}", f"{heads}.init_args.{size}")
        for heads in _HEADS
        for size in ("d_model", "embedding_width", "vocab_size")
    ),
    *((f"model.trunk.{size}", f"model.objectives.init_args.{size}") for size in ("d_model", "vocab_size")),
    ("model.vocab_size", "data.init_args.vocab_size"),
    ("model.lookahead", "data.init_args.lookahead"),
)
"""Pairs of source and target: a size is written at its source, and filled in at its target."""


def link_sizes(parser: ArgumentParser) -> None:
    """Let a parser fill in every size that another component defines.

    Args:
        parser: With ``model`` and ``data``.
    """
    for source, target in LINKS:
        parser.link_arguments(source, target, apply_on="instantiate")


def check_sizes(config: Namespace, instantiated: Namespace) -> None:
    """Reject a configuration with contradicting or incompatible sizes.

    Args:
        config: The parsed configuration.
        instantiated: The same with instances instead of classes and arguments.

    Raises:
        ValueError: If a size that is filled in was given with another value, or the data has token ids that the trunk
            cannot embed.
    """
    for source, target in LINKS:
        _agree(config, target, source, _attribute(instantiated, source))
    _check_embedded(instantiated["data"], instantiated["model"].vocab_size)


def assemble(model: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[MTPModule, LightningDataModule]:
    """Build the module and the data that ``fit`` would build from the sections ``model`` and ``data`` of its YAML.

    Args:
        model: Arguments of :class:`~mtp_modules.training.MTPModule`; components by class path and arguments.
        data: Class path and arguments of the data module.

    Raises:
        ValueError: If a class or an argument is unknown, of the wrong type or rejected, or sizes are incompatible.
    """
    parser = LightningSentenceParser()
    parser.add_lightning_class_args(MTPModule, "model")
    links = [(source, target) for source, target in LINKS if target.startswith("model.")]
    for source, target in links:
        parser.link_arguments(source, target, apply_on="instantiate")
    config = parser.parse_object({"model": dict(model)})
    instantiated = parser.instantiate(config)
    for source, target in links:
        _agree(config, target, source, _attribute(instantiated, source))
    module: MTPModule = instantiated["model"]
    return module, assemble_data(data, lookahead=module.lookahead, vocab_size=module.vocab_size)


def assemble_data(data: Mapping[str, Any], *, lookahead: int, vocab_size: int) -> LightningDataModule:
    """Build the data module that ``fit`` would build from the section ``data`` of its YAML, for a given model.

    Args:
        data: Class path and arguments of the data module.
        lookahead: The model's largest horizon.
        vocab_size: How many token ids its trunk embeds.

    Raises:
        ValueError: If the class or an argument is unknown, of the wrong type or rejected, or sizes are incompatible.
    """
    sizes = {"vocab_size": vocab_size, "lookahead": lookahead}
    parser = SentenceParser()
    for name in sizes:
        parser.add_argument(f"--model.{name}", type=int)
    parser.add_argument(
        "--data", type=LightningDataModule, required=True
    )  # not optional, so that errors name the class
    links = [(source, target) for source, target in LINKS if target.startswith("data.")]
    for source, target in links:
        parser.link_arguments(source, target, apply_on="parse")
    config = parser.parse_object({"model": sizes, "data": dict(data)})
    given = dict(data.get("init_args") or {})  # without the values that the links fill in
    for source, target in links:
        _check_given(
            target, given.get(target.rpartition(".")[2]), _default(config["data"], target), source, config[source]
        )
    made: LightningDataModule = parser.instantiate(config)["data"]
    _check_embedded(made, vocab_size)
    return made


def _agree(config: Namespace, target: str, source: str, filled: Any) -> None:
    """Reject a size of one class, or of each in a list, that was given with another value than the one filled in."""
    owner, _, argument = target.partition(".init_args.")
    found = config.get(owner)
    for each in found if isinstance(found, list | tuple) else [found]:
        if each is not None:
            given = (each.get("init_args") or {}).get(argument)
            _check_given(target, given, _default(each, target), source, filled)


def _check_given(target: str, given: Any, default: Any, source: str, filled: Any) -> None:
    if given not in (None, filled, default) and filled is not None:
        refuse(target, f"is {given} here, but {source} is {filled}; leave it out, it is filled in.")


def _check_embedded(data: LightningDataModule, vocab_size: int) -> None:
    tokens = getattr(data, "vocab_size", None)
    if tokens is not None and tokens > vocab_size:
        refuse(
            "model.trunk.vocab_size",
            f"is {vocab_size}, but the data has {tokens} token ids; make it at least {tokens}.",
        )


def _default(config: Namespace, target: str) -> Any:
    """Return the default of the argument of a configured class, which contradicts no other value."""
    argument = target.rpartition(".init_args.")[2]
    module, _, name = config.class_path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return parameters[argument].default if argument in parameters else None


def _attribute(config: Namespace, path: str) -> Any:
    """Follow a link's source into the instantiated components."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Namespace) else getattr(value, part, None)
    return value
