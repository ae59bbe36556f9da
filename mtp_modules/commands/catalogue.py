"""All commands, and where each is: read without importing torch, so that help and a wrong word are answered at once."""

import difflib
from typing import NamedTuple

PROG = "python -m mtp_modules"
DEBUG = "Errors are one sentence; add --debug to any command for the traceback."

TRAINER = {
    "fit": "Train a model, and test its best checkpoint.",
    "validate": "Measure a model on the validation split.",
    "test": "Measure a model on the test split.",
    "predict": "Write the most likely tokens of every horizon at every position of the test split.",
}
"""The commands that Lightning's trainer runs, each with its sentence."""


class Home(NamedTuple):
    """Where the function of a command is.

    Attributes:
        module: Module of this package; its docstrings and signatures are the help.
        function: Its name there.
    """

    module: str
    function: str


OWN = {
    "generate": Home("generate", "generate"),
    "chat": Home("chat", "chat"),
    "diagnose": Home("diagnose", "diagnose"),
    "report": Home("report", "report"),
    "study": Home("study", "study"),
    "sample": Home("sample", "sample"),
    "prepare": Home("prepare", "prepare"),
    "export": Home("exchange", "export"),
    "import": Home("exchange", "import_"),
    "configs": Home("configs", "configs"),
    "completion": Home("completion", "completion"),
}
"""The other commands."""


def unknown(command: str) -> str | None:
    """Return what to say of a word that is no command; ``None`` for one that is.

    Args:
        command: The first word of the command line; empty if there is none.
    """
    if command in TRAINER or command in OWN:
        return None
    commands = [*TRAINER, *OWN]
    known, close = ", ".join(commands), difflib.get_close_matches(command, commands, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    return (
        f"command: {command!r} is unknown{meant} Known: {known}."
        if command
        else f"command: none given. Known: {known}."
    )
