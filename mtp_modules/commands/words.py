"""Words of the command line that no command takes, found without importing torch."""

import ast
import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mtp_modules.commands.catalogue import TRAINER
from mtp_modules.commands.signatures import signature_of

_SECTIONS = {"model": "training/module.py", "trainer": "pytorch/trainer/trainer.py"}
_SHOWN = ("seed_everything", "trainer", "model", "data", "ckpt_path", "init_from")
_OTHERS = ("config", "print_config", "weights_only", "verbose", "return_predictions")
_ALWAYS = ("help", "print_shtab")


def wrong_word(command: str, words: Sequence[str]) -> str | None:
    """Return what to say of an option that a command does not have, or that it needs; ``None`` if nothing is wrong.

    What it says nothing of may still be wrong: values, and arguments of classes.

    Args:
        command: One of the catalogue.
        words: Those after it.
    """
    return _of_trainer(words) if command in TRAINER else _of_own(command, words)


def _of_own(command: str, words: Sequence[str]) -> str | None:
    arguments = signature_of(command).arguments
    names = [argument.name for argument in arguments]
    given = {names[0]} if names and words and not words[0].startswith("-") else set()
    for option in _options(words):
        name = option.partition(".")[0]
        if name not in (*names, *_ALWAYS):
            return _unknown(f"unknown argument {option!r}", name, names)
        given.add(name)
    missing = [argument for argument in arguments if argument.default is None and argument.name not in given]
    return f"{missing[0].name}: is missing. {missing[0].meaning}" if missing else None


def _of_trainer(words: Sequence[str]) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=False):  # one longer where there are no words
        value = (
            word.removeprefix("--config=") if word.startswith("--config=") else following if word == "--config" else ""
        )
        inline = value.lstrip().startswith(("{", "-")) or ": " in value or "\n" in value
        if value and not inline and not Path(value).expanduser().exists():
            return f"config: {value} does not exist; give a YAML file."
    for option in _options(words):
        section, _, rest = option.partition(".")
        if section not in (*_SHOWN, *_OTHERS, *_ALWAYS):
            return _unknown(f"unknown argument {option!r}", section, _SHOWN)
        name = rest.partition(".")[0]
        known = _arguments_of(section) if rest and section in _SECTIONS else ()
        if known and name not in (*known, *_ALWAYS):
            return _unknown(f"{section} has no argument {name!r}", name, known)
    return None


def _options(words: Sequence[str]) -> Iterator[str]:
    """Yield the names of options as they are written."""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            yield word[2:].partition("=")[0].removesuffix("+")


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{what}{f'; did you mean {close[0]}?' if close else '.'} Known: {', '.join(known)}."


@cache
def _arguments_of(section: str) -> tuple[str, ...]:
    """Return the arguments of the model or the trainer, read from its source; none if that is elsewhere."""
    found = find_spec("lightning" if section == "trainer" else "mtp_modules")
    for home in (found and found.submodule_search_locations) or ():
        path = Path(home, _SECTIONS[section])
        if path.is_file():
            classes = (
                node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
            )
            for made in classes:
                for node in made.body:
                    if (
                        isinstance(node, ast.FunctionDef)
                        and node.name == "__init__"
                        and made.name in ("Trainer", "MTPModule")
                    ):
                        arguments = [*node.args.args, *node.args.kwonlyargs]
                        return tuple(argument.arg for argument in arguments if argument.arg != "self")
    return ()
