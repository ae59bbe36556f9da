"""A command-line parser whose errors are one sentence and name what would have been right."""

import importlib
import inspect
import re
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer

from mtp_modules.core.checks import InputError
from mtp_modules.core.interfaces import Heads, HorizonWeights, LinearCrossEntropy, Tokenizer, Trunk
from mtp_modules.losses import MultiTokenLoss
from mtp_modules.training.schedules import LearningRateSchedule

_ROLES: dict[str, type] = {
    "trunk": Trunk,
    "heads": Heads,
    "loss": MultiTokenLoss,
    "weights": HorizonWeights,
    "backend": LinearCrossEntropy,
    "tokenizer": Tokenizer,
    "lr_schedule": LearningRateSchedule,
    "optimizer": Optimizer,
    "data": LightningDataModule,
}
_KEY = re.compile(r'(?:Parser key|Key) "([^"]+)"')
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_OPTION = re.compile(r"class_path[ =]'([\w.]+)'.*?Option '(\w+)' is not accepted", re.DOTALL)
_UNKNOWN_OPTION_FIRST = re.compile(r"Option '(\w+)' is not accepted.*?class_path='([\w.]+)'", re.DOTALL)
_WRONG_TYPE = re.compile(r"Expected a <class '(\w+)'>\.? Got value: (.*)")


def sentence(message: str) -> str:
    """Say in one sentence what a parser's message says in many lines.

    Args:
        message: Of jsonargparse.
    """
    keys = _KEY.findall(message)
    key = ".".join(keys) if keys else ""
    if found := _UNKNOWN_OPTION.search(message):
        return _unknown_option(key, found[1], found[2])
    if found := _UNKNOWN_OPTION_FIRST.search(message):
        return _unknown_option(key, found[2], found[1])
    if found := _UNKNOWN_CLASS.search(message):
        role = key.rpartition(".")[2]
        known = f" Known: {', '.join(_known(_ROLES[role]))}." if role in _ROLES else ""
        way_out = "Name a class of your own by its import path, package.module.Class."
        return f"{key}: unknown class {found[1]!r}.{known} {way_out}"
    if found := _WRONG_TYPE.search(message):
        return f"{key}: must be of type {found[1]}, got {found[2].strip()}."
    return " ".join(message.split())


def _known(base: type) -> list[str]:
    """Return the short names of the final classes that can stand for a base, ours and torch's."""
    found, waiting = set(), [base]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        if not inspect.isabstract(cls) and cls.__module__.startswith(("mtp_modules.", "torch.optim.")):
            found.add(cls.__name__)
    return sorted(found - {"Optimizer"})


def _unknown_option(key: str, class_path: str, option: str) -> str:
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    parameters = [parameter for parameter in inspect.signature(cls.__init__).parameters if parameter != "self"]
    return f"{key}: {name} has no argument {option!r}. Known: {', '.join(parameters)}."


class SentenceParser(ArgumentParser):
    """jsonargparse's parser, refusing in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse; parsers of nested classes leave it to the outermost."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise InputError(sentence(message)) from ex


class LightningSentenceParser(LightningArgumentParser):
    """Lightning's parser, refusing in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse; parsers of nested classes leave it to the outermost."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise InputError(sentence(message)) from ex
