"""Run the command line in this process."""

import sys
from pathlib import Path

import pytest

from mtp_modules.cli import main
from mtp_modules.training import MTPModule

ROOT = Path(__file__).parents[1]
RETROFIT = ROOT / "configs" / "retrofit_smollm2.yaml"
"""Needs a model that is not here; it has tests of its own, with a small one in its place."""
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("retrofit"))


def run(*arguments: str | Path) -> None:
    """Do what ``python -m mtp_modules`` does with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["python -m mtp_modules", *map(str, arguments)])
        main()


def refusal(*arguments: str | Path) -> str:
    """Run a command that must end before any training, with one sentence; return the sentence."""

    def no_step(*_: object) -> None:
        raise AssertionError("training began")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MTPModule, "training_step", no_step)
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
    sentence = stopped.value.code  # a text as exit code is printed to stderr, and the status is 1
    assert isinstance(sentence, str)
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    return sentence.removeprefix("error: ")
