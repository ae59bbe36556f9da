"""What commands that decode have in common."""

from pathlib import Path

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.loading import load_model
from mtp_modules.model import MTPModel


def load_on(ckpt_path: str, device: str) -> tuple[MTPModel, Tokenizer | None]:
    """Load a model and its tokenizer onto a device.

    Args:
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        device: Where to, such as cpu or cuda.

    Raises:
        ValueError: If there is no such checkpoint or device.
    """
    model, tokenizer = load_model(ckpt_path)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch was built without it, or there is none
        refuse("device", f"cannot use {device!r} here ({str(error).splitlines()[0]}); try cpu.")
    return model, tokenizer


def encode(prompt: str, tokenizer: Tokenizer | None) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        prompt: Text; numbers separated by spaces if the model has no tokenizer.
        tokenizer: Of the model.

    Raises:
        ValueError: If the prompt is not UTF-8, or there is no tokenizer and it is no list of numbers.
    """
    utf8(prompt)
    if tokenizer is not None:
        return tokenizer.encode(prompt)
    try:
        return [int(word) for word in prompt.split()]
    except ValueError:
        refuse(
            "prompt", f"this model has no tokenizer, so the prompt must be numbers with spaces between, got {prompt!r}."
        )


def utf8(text: str) -> str:
    """Return a text that was typed.

    Args:
        text: The text.

    Raises:
        ValueError: If it holds bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python keeps foreign bytes of the command line as lone surrogates
        refuse("prompt", f"holds bytes that are not UTF-8, {text!a}; convert it, or set the locale of the terminal.")
    return text


def writable(argument: str, path: str | None) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Args:
        argument: What names it.
        path: The file; ``None`` is none.

    Raises:
        ValueError: If it is a folder, or lies in none.
    """
    if path is None:
        return
    if Path(path).is_dir():
        refuse(argument, f"{path} is a folder; give the name of a file in it.")
    if not Path(path).parent.is_dir():
        refuse(argument, f"there is no folder {Path(path).parent} for {Path(path).name}; make it, or write elsewhere.")
