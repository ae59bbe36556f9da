"""A command-line parser whose errors are one sentence with the valid choices."""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer

from mtp_modules.core.auxiliary import AuxiliaryObjective
from mtp_modules.core.checks import InputError
from mtp_modules.core.interfaces import Heads, Tokenizer, Trunk
from mtp_modules.core.objective import HorizonWeights, LinearCrossEntropy
from mtp_modules.data import Augmentation, Task
from mtp_modules.decoders import Acceptance, Decoder, Drafter, DraftPolicy, DraftTree, SamplingParams
from mtp_modules.losses import MultiTokenLoss
from mtp_modules.training.module import MTPModule
from mtp_modules.training.parallel import Sharding
from mtp_modules.training.schedules import LearningRateSchedule
from mtp_modules.training.teacher import TeacherModel

ROLES: dict[str, type] = {
    "trunk": Trunk,
    "heads": Heads,
    "loss": MultiTokenLoss,
    "objectives": AuxiliaryObjective,
    "weights": HorizonWeights,
    "backend": LinearCrossEntropy,
    "tokenizer": Tokenizer,
    "lr_schedule": LearningRateSchedule,
    "sharding": Sharding,
    "teacher": TeacherModel,
    "task": Task,
    "augmentation": Augmentation,
    "optimizer": Optimizer,
    "data": LightningDataModule,
    "decoder": Decoder,
    "drafter": Drafter,
    "acceptance": Acceptance,
    "policy": DraftPolicy,
    "tree": DraftTree,
    "sampling": SamplingParams,
}
"""The base class of each argument that names a class."""
_KEY = re.compile(r'(?:Parser key|Key) "([^"]+)"')
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_OPTION = re.compile(
    r"class_path[ =]'([\w.]+)'(?:(?!class_path).)*?Option '([\w.]+)' is not accepted", re.DOTALL
)
_UNKNOWN_OPTION_FIRST = re.compile(r"Option '([\w.]+)' is not accepted.*?class_path='([\w.]+)'", re.DOTALL)
_UNKNOWN_KEY = re.compile(r"does not accept option '([\w.]+)'|unrecognized arguments: (?:-*)([\w.]+)")
_WRONG_TYPE = re.compile(r"Expected a <class '(\w+)'>(?:\.? Got value: (.*))?")
_REQUIRED = re.compile(r"class_path '([\w.]+)':\s+the following arguments are required: (\w+(?:, \w+)*)")
_REQUIREMENT = re.compile(r"Requirement '([^']+)' not met")
_TENSORBOARD = "Neither `tensorboard` nor `tensorboardX` is available"
_GIVEN = re.compile(r"Given value: (.*)")
_IMPORT_PATH = re.compile(r"^\W*(?:\{'class_path': '|class_path=')?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)\W*")
_SECTIONS: dict[str, Callable[..., Any]] = {"model": MTPModule.__init__, "trainer": Trainer.__init__}


def sentence(message: str, known: Sequence[str]) -> str:
    """Shorten a parser's message to one sentence.

    Args:
        message: Message of jsonargparse.
        known: Arguments of the parser itself.
    """
    if missing := missing_package(message):
        return missing
    keys = _KEY.findall(message)
    key = ".".join(keys) if keys else ""
    if found := _UNKNOWN_KEY.search(message):
        return _unknown_key(found[1] or found[2], known)
    if found := _UNKNOWN_OPTION.search(message):
        return _unknown_option(key, found[1], found[2])
    if found := _UNKNOWN_OPTION_FIRST.search(message):
        return _unknown_option(key, found[2], found[1])
    if found := _REQUIRED.search(message):
        return f"{key}: {found[1].rpartition('.')[2]} needs {found[2]}; give it in init_args."
    if found := _UNKNOWN_CLASS.search(message):
        role = key.rpartition(".")[2]
        names = list(known_classes(ROLES[role])) if role in ROLES else []
        close = difflib.get_close_matches(found[1], names, n=1)
        meant = f"; did you mean {close[0]}?" if close else "."
        known = f" Known: {', '.join(names)}." if names else ""
        remedy = "Name a class of your own by its import path, package.module.Class."
        return f"{f'{key}: ' if key else ''}unknown class {found[1]!r}{meant}{known} {remedy}"
    if expected := _WRONG_TYPE.findall(message):
        given = _GIVEN.search(message)
        value = given[1] if given else expected[0][1]
        if (missing := _missing_class(value)) is not None:
            return f"{key}: {missing}"
        types = " or ".join("null" if name == "NoneType" else name for name, _ in expected)
        return f"{key}: must be of type {types}, got {value.strip()}."
    return " ".join(_KEY.sub(r"\1", message).split())


def _missing_class(value: str) -> str | None:
    """Return why an import path does not lead to a class; ``None`` if it does, or the value is no import path."""
    path = _IMPORT_PATH.search(value)
    if path is None:
        return None
    module_name, _, name = path[1].rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return f"{path[1]!r} cannot be imported ({error}); check its spelling, or install its package."
    if hasattr(module, name):
        return None
    close = difflib.get_close_matches(name, {*dir(module), *getattr(module, "__all__", ())}, n=1)
    meant = f"; did you mean {module_name}.{close[0]}?" if close else "; check its spelling."
    return f"{module_name} has no class {name!r}{meant}"


def missing_package(message: str) -> str | None:
    """Return a sentence if a logger lacks the package that it writes with.

    Args:
        message: Of an error.
    """
    found = _REQUIREMENT.search(message)
    package = found[1] if found else "tensorboard" if _TENSORBOARD in message else None
    if package is None:
        return None
    return f"trainer.logger: needs {package}, which is not installed; install it with: pip install '{package}'."


def known_classes(base: type) -> dict[str, type]:
    """Return the concrete subclasses of a base by short name, ours and torch's.

    Args:
        base: Such as ``Heads``.
    """
    found, waiting = {}, [base]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        own = cls.__module__.startswith(("mtp_modules.", "torch.optim.")) and not cls.__name__.startswith("_")
        if own and cls is not Optimizer and not inspect.isabstract(cls):
            found[cls.__name__] = cls
    return dict(sorted(found.items()))


def _unknown_option(key: str, class_path: str, option: str) -> str:
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return f"{key}: {name} has no argument {option!r}. Known: {', '.join(_parameters(cls.__init__))}."


def _unknown_key(key: str, known: Sequence[str]) -> str:
    section, _, option = key.partition(".")
    if option and section in _SECTIONS:
        return f"{section} has no argument {option!r}. Known: {', '.join(_parameters(_SECTIONS[section]))}."
    return f"unknown argument {key!r}. Known: {', '.join(known)}."


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


class _TextFiles:
    """Report a configuration that is not text."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, and raise an error of one sentence for a binary file."""
        try:
            return super().parse_args(*args, **kwargs)  # type: ignore[misc]
        except UnicodeDecodeError as error:
            raise InputError("config: is not text in UTF-8; give a YAML file.") from error


class SentenceParser(_TextFiles, ArgumentParser):
    """jsonargparse's parser with errors of one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error; parsers of nested classes leave it to the outermost one."""
        if not self.exit_on_error:
            super().error(message, ex)
        own = [action.dest for action in self._actions if action.dest != "print_shtab"]
        known = [name for name in own if name.rpartition(".")[2] != "help"]
        raise InputError(sentence(message, known)) from ex


class LightningSentenceParser(_TextFiles, LightningArgumentParser):
    """Lightning's parser with errors of one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error; parsers of nested classes leave it to the outermost one."""
        if not self.exit_on_error:
            super().error(message, ex)
        own = [action.dest for action in self._actions if action.dest == "init_from"]
        raise InputError(sentence(message, ("seed_everything", "trainer", "model", "data", "ckpt_path", *own))) from ex
