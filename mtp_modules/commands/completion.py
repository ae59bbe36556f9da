"""``python -m mtp_modules completion``: a script with which a shell completes commands, options and class names."""

import inspect
from collections.abc import Iterable, Iterator

from jsonargparse import ArgumentParser

from mtp_modules.commands.catalogue import OWN, TRAINER
from mtp_modules.commands.configs import shipped_configs
from mtp_modules.commands.running import function_of, parser_of
from mtp_modules.commands.trainer import trainer_parsers
from mtp_modules.configuration.parser import ROLES, known_classes

_SCRIPT = """\
# Completes mtp_modules in bash and zsh: source <(mtp_modules completion)
[ -n "${ZSH_VERSION-}" ] && autoload -U +X bashcompinit && bashcompinit
_mtp_modules() {
  local word="${COMP_WORDS[COMP_CWORD]}" option="${COMP_WORDS[COMP_CWORD-1]}" words=""
  [ "$word" = "=" ] && word=""
  [ "$option" = "=" ] && option="${COMP_WORDS[COMP_CWORD-2]}"
  if [ "$COMP_CWORD" = 1 ]; then
    words="@COMMANDS"
  else
    case "$option" in
@VALUES
      *) case "$word" in -*) case "${COMP_WORDS[1]}" in
@OPTIONS
      esac;; esac;;
    esac
  fi
  local IFS=$' \\t\\n'
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$word"))
  else IFS=$'\\n'; COMPREPLY=($(compgen -f -- "$word")); fi
}
complete -o filenames -F _mtp_modules mtp_modules
"""


def completion() -> None:
    """Print a script with which bash and zsh complete commands, options, class names and files.

    It completes the words after mtp_modules, the program that installing the package adds.
    """
    options, values = dict[str, list[str]](), dict[str, list[str]]()
    parsers: dict[str, ArgumentParser] = dict(trainer_parsers())
    parsers |= {command: parser_of(command, function_of(command)) for command in OWN}
    for command, parser in parsers.items():
        names = sorted(_long(parser))
        for option in list(names):
            if (role := option.rpartition(".")[2].removeprefix("--")) in ROLES:
                classes = known_classes(ROLES[role])
                values[option] = list(classes)
                names += [f"{option}.{argument}" for argument in _arguments(classes.values())]
        options[command] = [*names, "--help", "--help.all", "--debug"]
    values["configs"], values["copy"] = ["list", "copy"], list(shipped_configs())
    script = _SCRIPT.replace("@COMMANDS", " ".join([*TRAINER, *OWN]))
    script = script.replace("@VALUES", _cases(values)).replace("@OPTIONS", _cases(options))
    print(script, end="")


def _long(parser: ArgumentParser) -> set[str]:
    """Return the long options of a parser, without those that only give help about one."""
    found = {option for action in parser._actions for option in action.option_strings}
    return {option for option in found if option.startswith("--") and not option.endswith((".help", "+", "--help"))}


def _arguments(classes: Iterable[type]) -> list[str]:
    """Return what the constructors of some classes take."""
    found = {name for cls in classes for name in inspect.signature(cls).parameters}
    return sorted(found - {"args", "kwargs", "params"})


def _cases(words: dict[str, list[str]]) -> str:
    """Return the branches of a ``case`` that set ``words``."""

    def branches() -> Iterator[str]:
        for pattern, choices in words.items():
            yield f"""      {pattern}) words="{" ".join(choices)}";;"""

    return "\n".join(branches())
