"""``python -m mtp_modules configs``: the configurations that come with the package."""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

_PACKAGE = Path(__file__).parents[1]


def configs(action: str = "list", name: str | None = None, to: str | None = None) -> None:
    """List the shipped configurations; configs copy NAME writes one into this folder.

    Args:
        action: list or copy.
        name: Of the configuration to copy, such as quickstart or overlays/ddp.
        to: File to write, which must not exist; NAME.yaml in this folder if null.
    """
    if action == "list":
        for known, path in shipped_configs().items():
            print(f"{known:<26}{_headline(path)}")
        print("\nCopy one: python -m mtp_modules configs copy NAME")
        return
    found = shipped_configs()
    if name is None or name not in found:
        given = "name is missing." if name is None else f"name {name!r} is unknown."
        _refuse(f"{given} Known: {', '.join(found)}.")
    target = Path(f"{Path(name).name}.yaml" if to is None else to)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(found[name].read_text(encoding="utf-8"))
    except FileExistsError:
        _refuse(f"{target} exists and is kept; give another file with --to.")
    except OSError as error:
        _refuse(f"{target} cannot be written ({error.strerror}); give another file with --to.")
    use = f"--config quickstart.yaml --config {target}" if name.startswith("overlays/") else f"--config {target}"
    print(f"Written: {target}\nNext: python -m mtp_modules fit {use}")


def shipped_configs() -> dict[str, Path]:
    """Return the files of the shipped configurations by name: of the installed package, or of the source tree."""
    places = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    folder = next((place for place in places if (place / "quickstart.yaml").is_file()), places[0])
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def answer_configs(arguments: list[str]) -> None:
    """Run the command with the words that follow it: ``copy NAME``, ``--to FILE``.

    Args:
        arguments: After ``configs``.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("action", nargs="?", choices=("list", "copy"), default="list")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--to")
    configs(**vars(parser.parse_args(arguments)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(f"{message}; the actions are list and copy NAME, with --to FILE.")


def _headline(path: Path) -> str:
    """Return the first sentence of the comment that a configuration begins with, without how an overlay is used."""
    text = path.read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.partition("\ntrainer")[0].splitlines() if line[:1] == "#")
    use, _, rest = comment.partition(".yaml: ")
    sentence = (rest if use.startswith("On top of a run") else comment).partition(". ")[0].rstrip(".") + "."
    return textwrap.shorten(sentence, 90, placeholder=" ...")


def _refuse(rule: str) -> NoReturn:
    """End with a sentence; ``core.checks.refuse`` would import torch for it."""
    sys.exit(f"error: configs: {rule}")
