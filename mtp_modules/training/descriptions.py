"""Comparison of descriptions as plain data: nothing that a checkpoint names is imported or built."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mtp_modules.core.auxiliary import AuxiliaryObjective
from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Description, describe
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.loading import CHECKPOINT_KEY
from mtp_modules.model import MTPModel
from mtp_modules.pretrained import FORMAT, check_format

FREE = {
    "dropout": "acts in training only, and has no weights",
    "embedding_std": "scales the initial embedding, which the weights of the checkpoint replace",
    "max_positions": "limits the length of a sequence; no weight and no output depends on it",
    "norm_gain": "is the initial gain of a norm, which the weights of the checkpoint replace",
}
"""Constructor arguments of models that may differ from those of a checkpoint, each with the reason.

All others change what the weights mean.
"""

FREE_IN_CONFIG = ("_name_or_path", "architectures", "dtype", "initializer_range", "transformers_version", "use_cache")
"""Entries of a configuration of ``transformers`` that do not change the model, beside its dropout rates."""

_LONGEST = 60


class Difference(NamedTuple):
    """A value that is another here than in a checkpoint.

    Attributes:
        name: Dotted name of the argument.
        here: Its value in the configured run, for a message.
        saved: Its value in the checkpoint, for a message.
    """

    name: str
    here: str
    saved: str


def check_same_model(model: MTPModel, tokenizer: Tokenizer | None, saved: Mapping[str, Any], origin: str) -> None:
    """Raise an error if a checkpoint belongs to another model or tokenizer, even if all weights fit.

    Args:
        model: As configured.
        tokenizer: Of the data; ``None`` if it has none.
        saved: What the checkpoint says of itself: the layout of its weights, the model and the tokenizer.
        origin: ``"ckpt_path"`` or ``"init_from"``, for the error message.

    Raises:
        ValueError: If the layout, an argument of the model or one of the tokenizer differs.
    """
    check_format(origin, saved.get("format"), "the checkpoint")
    pairs: list[tuple[str, Description, Any]] = [("model", describe(model), saved.get("model"))]
    if tokenizer is not None and saved.get("tokenizer"):
        pairs.append(("data.tokenizer", describe(tokenizer), saved["tokenizer"]))
    for name, here, there in pairs:
        for found in differences(here, there, name, free=FREE):
            refuse(
                origin,
                f"{found.name} is {found.here} here, but the checkpoint was trained with {found.saved}; "
                "take the checkpoint's value, or train a new model.",
            )


def described(
    model: MTPModel, tokenizer: Tokenizer | None, objectives: Sequence[AuxiliaryObjective] = ()
) -> dict[str, Any]:
    """Return what a checkpoint says of its layout, its model, its tokenizer and its auxiliary objectives.

    Args:
        model: Whose weights it holds.
        tokenizer: Of the data; ``None`` if there is none.
        objectives: Those that it has weights of too.
    """
    found = {
        "format": FORMAT,
        "model": describe(model),
        "tokenizer": None if tokenizer is None else describe(tokenizer),
    }
    return found | ({"objectives": [describe(each) for each in objectives]} if objectives else {})


def own_description(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a checkpoint says of itself; nothing if it was not written by this package.

    Args:
        checkpoint: As Lightning loads it.
    """
    found = checkpoint.get(CHECKPOINT_KEY)
    return found if isinstance(found, Mapping) else {}


def differences(here: Any, saved: Any, name: str, *, free: Mapping[str, str] | None = None) -> Iterator[Difference]:
    """Yield where plain values differ, in the order of the arguments.

    An argument that the checkpoint does not have is one that its version of the package did not have; it must then have
    its default here.

    Args:
        here: A description, or any plain value, of the configured run.
        saved: The same of the checkpoint.
        name: Dotted name so far.
        free: Names of arguments that may differ.
    """
    if isinstance(here, Mapping) and isinstance(saved, Mapping):
        if here.get("class_path") == saved.get("class_path"):
            yield from _in_mappings(here, saved, name, free or {})
        else:
            yield _difference(name, here, saved)
    elif isinstance(here, list) and isinstance(saved, list) and len(here) == len(saved):
        for index, (mine, other) in enumerate(zip(here, saved, strict=True)):
            yield from differences(mine, other, f"{name}[{index}]", free=free)
    elif here != saved:
        yield _difference(name, here, saved)


def _in_mappings(
    here: Mapping[str, Any], saved: Mapping[str, Any], name: str, free: Mapping[str, str]
) -> Iterator[Difference]:
    if "class_path" not in here and not free:
        if here != saved:
            yield _difference(name, dict(here), dict(saved))
        return
    if "class_path" not in here:  # a configuration of transformers, whose versions add and remove entries
        for key in here:
            if key in saved and not (key in FREE_IN_CONFIG or key.endswith(("dropout", "pdrop"))):
                yield from differences(here[key], saved[key], f"{name}.{key}", free=free)
        return
    mine, others = here.get("init_args", {}), saved.get("init_args", {})
    for key in [*mine, *(key for key in others if key not in mine)]:
        if key in free:
            continue
        if key not in mine:
            yield Difference(f"{name}.{key}", "unknown", _shown(others[key]))
        elif key in others:
            yield from differences(mine[key], others[key], f"{name}.{key}", free=free)
        elif mine[key] != (default := _default(str(here["class_path"]), key)):
            yield _difference(f"{name}.{key}", mine[key], default)


def _default(class_path: str, argument: str) -> Any:
    """Return the default of an argument of a class that is imported already."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    found = None if cls is None else inspect.signature(cls).parameters.get(argument)
    return None if found is None or found.default is found.empty else found.default


def _difference(name: str, here: Any, saved: Any) -> Difference:
    first, second = _shown(here), _shown(saved)
    if first == second and isinstance(here, Mapping) and isinstance(saved, Mapping):
        first, second = str(here.get("class_path")), str(saved.get("class_path"))
    if max(len(first), len(second)) > _LONGEST:
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        start = max(0, min(same, min(len(first), len(second)) - 1) - 10)
        first, second = _cut(first, start), _cut(second, start)
    return Difference(name, first, second)


def _cut(text: str, start: int) -> str:
    """Return a piece of a long text."""
    end = start + _LONGEST
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"


def _shown(value: Any) -> str:
    """Return a value as a message shows it: a component by the name of its class."""
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return "nothing" if value is None else repr(value)
