"""What is answered before torch is imported: help, a wrong word, and the shipped configurations."""

import shutil
import sys
import textwrap

from mtp_modules.commands.catalogue import DEBUG, OWN, PROG, TRAINER, unknown
from mtp_modules.commands.configs import answer_configs
from mtp_modules.commands.signatures import signature_of
from mtp_modules.commands.trainer_help import trainer_help
from mtp_modules.commands.words import wrong_word

HELP, ALL = ("-h", "--help"), "--help.all"


def answered(arguments: list[str]) -> bool:
    """Answer a command line that asks for nothing but text; return whether it did.

    Args:
        arguments: Without the name of the program.

    Raises:
        SystemExit: With a sentence, if the first word is no command.
    """
    command = arguments[0] if arguments else ""
    if command in HELP:
        print(overview())
    elif command == "--version":
        from mtp_modules import __version__

        print(__version__)
    elif command.startswith("-") and command != ALL:
        return False  # options of the trainer's commands may come first
    elif said := unknown(command) if command != ALL else None:
        sys.exit(f"error: {said}")
    elif command == ALL:
        print(overview())
    elif any(word in HELP for word in arguments[1:]):
        print(trainer_help(command) if command in TRAINER else own_help(command))
    elif ALL not in arguments and (said := wrong_word(command, arguments[1:])):
        sys.exit(f"error: {said}")
    elif command == "configs":
        answer_configs(arguments[1:])
    else:
        return False
    return True


def overview() -> str:
    """Return the help of the program: every command with its sentence."""
    sentences = TRAINER | {command: signature_of(command).sentence for command in OWN}
    lines = [f"usage: {PROG} COMMAND [options]", "", "commands:"]
    for command, sentence in sentences.items():
        lines += _entry(command, sentence, 12)
    start = f"A first run: {PROG} configs copy quickstart, then {PROG} fit --config quickstart.yaml."
    return "\n".join([*lines, "", *_filled(f"{PROG} COMMAND --help has the options of a command. {start} {DEBUG}")])


def own_help(command: str) -> str:
    """Return the help of a command of our own.

    Args:
        command: Its name.
    """
    found = signature_of(command)
    required = [argument.name.upper() for argument in found.arguments if argument.default is None]
    lines = [f"usage: {' '.join([PROG, command, *required])} [options]", "", *_filled(found.sentence)]
    for paragraph in found.details:
        lines += ["", *_filled(paragraph)]
    lines += ["", "options:"]
    for argument in found.arguments:
        default = "required" if argument.default is None else f"default: {_as_yaml(argument.default)}"
        lines += _entry(f"--{argument.name}", f"{argument.meaning} ({default})", 18)
    return "\n".join([*lines, "", *_filled(f"--help.all has the type of every option. {DEBUG}")])


def _as_yaml(default: str) -> str:
    """Return a default as it is written on the command line."""
    return {"None": "null", "True": "true", "False": "false"}.get(default, default)


def _entry(name: str, text: str, column: int) -> list[str]:
    """Return a name and what it means, beside each other."""
    indent = " " * (column + 2)
    first = f"  {name}".ljust(column + 1) + " "
    return textwrap.wrap(text, _width(), initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), break_on_hyphens=False)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)
