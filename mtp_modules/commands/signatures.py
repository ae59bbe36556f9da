"""What a command takes, read from its source: importing it would import torch."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtp_modules.commands.catalogue import OWN


@dataclass(frozen=True)
class Argument:
    """An argument of a command.

    Attributes:
        name: Its name.
        default: Its default, as it is spelled; ``None`` if it is required.
        meaning: What its docstring says of it.
    """

    name: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Signature:
    """What is known of a command without running it.

    Attributes:
        sentence: The first sentence of its docstring.
        details: The paragraphs after it.
        arguments: In their order.
    """

    sentence: str
    details: list[str]
    arguments: list[Argument]


@cache
def signature_of(command: str) -> Signature:
    """Return what a command takes.

    Args:
        command: Name of one of :data:`~mtp_modules.commands.catalogue.OWN`.
    """
    home = OWN[command]
    tree = ast.parse((Path(__file__).parent / f"{home.module}.py").read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == home.function)
    text, _, tail = (ast.get_docstring(found) or "").partition("\nArgs:\n")
    sentence, *details = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    meanings = _meanings(tail)
    given, defaults = found.args.args, found.args.defaults
    spelled = [*[None] * (len(given) - len(defaults)), *map(ast.unparse, defaults)]
    return Signature(
        sentence,
        details,
        [Argument(one.arg, default, meanings[one.arg]) for one, default in zip(given, spelled, strict=True)],
    )


def _meanings(section: str) -> dict[str, str]:
    """Return the text of every argument in the section ``Args`` of a docstring."""
    entries = section.partition("\n\n")[0]
    found = re.split(r"^    (\w+): ", entries, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(found[::2], found[1::2], strict=True)}
