"""Run a command of our own: from the words of the command line to the call of a function."""

import importlib
import inspect
import itertools
from collections.abc import Callable

from mtp_modules.commands.catalogue import DEBUG, OWN, PROG
from mtp_modules.commands.signatures import signature_of
from mtp_modules.configuration import SentenceParser


def run_command(command: str, arguments: list[str]) -> None:
    """Parse the arguments of a command, and call its function.

    Args:
        command: Name of one of :data:`~mtp_modules.commands.catalogue.OWN`.
        arguments: The words after it.

    Raises:
        ValueError: If an argument is unknown, missing or of the wrong type, or the command rejects it.
    """
    function = function_of(command)
    words = ["--help" if word == "--help.all" else word for word in arguments]
    parser = parser_of(command, function)
    function(**parser.instantiate(parser.parse_args(_spelled_out(function, words))).as_dict())


def function_of(command: str) -> Callable[..., None]:
    """Return the function of a command.

    Args:
        command: Its name.
    """
    module, name = OWN[command]
    found: Callable[..., None] = getattr(importlib.import_module(f"mtp_modules.commands.{module}"), name)
    return found


def parser_of(command: str, function: Callable[..., None]) -> SentenceParser:
    """Return the parser of a command.

    Args:
        command: Its name.
        function: What it calls.
    """
    signature = signature_of(command)
    description = "\n\n".join([signature.sentence, *signature.details])
    parser = SentenceParser(prog=f"{PROG} {command}", description=description, epilog=DEBUG)
    parser.add_function_arguments(function, as_group=False)
    return parser


def _spelled_out(function: Callable[..., None], arguments: list[str]) -> list[str]:
    """Add the name of the first argument, and ``true`` after a switch, where they are left out."""
    parameters = inspect.signature(function).parameters
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--{next(iter(parameters))}", *arguments]
    written = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        written.append(argument)
        name = argument.removeprefix("--")
        if argument.startswith("--") and name in parameters and parameters[name].annotation is bool:
            written += ["true"] if following.startswith("--") else []
    return written
