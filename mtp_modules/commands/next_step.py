"""The last line of a run: a command that decodes with what it trained."""

import shlex
from typing import Any

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data.prompts import row_beginnings
from mtp_modules.model import MTPModel

_USUAL = "def "
_LENGTH = 4


def next_command(checkpoint: str, model: MTPModel, tokenizer: Tokenizer | None, batches: Any) -> str:
    """Return a command that continues a prompt which the model understands.

    Args:
        checkpoint: Path of the checkpoint.
        model: What was trained; with one horizon there is nothing to compare.
        tokenizer: Of the data; without one the prompt is numbers.
        batches: Held-out batches, whose first row begins with a prompt; read lazily.
    """
    words = ["python", "-m", "mtp_modules", "generate", "--ckpt_path", checkpoint]
    if tokenizer is None or not _encodes(tokenizer, _USUAL):
        start = next(row_beginnings(batches, length=_LENGTH), [0])
        words += ["--prompt", " ".join(map(str, start)) if tokenizer is None else tokenizer.decode(start)]
    if len(model.horizons) > 1:
        words += ["--compare", "true"]
    return shlex.join(words)


def _encodes(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether a tokenizer gives tokens for a text."""
    try:
        return bool(tokenizer.encode(text))
    except ValueError:
        return False
