"""Results on disk: one JSON file per run, written atomically and rejected if it was modified or is outdated."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from mtp_modules.core.saving import write_text

FORMAT = 1


class UnusableResultError(Exception):
    """A file without a valid result; the message gives the reason."""


def content_hash(content: Any) -> str:
    """Return a short hash of plain values.

    Args:
        content: Values that JSON can represent.
    """
    text = json.dumps(content, sort_keys=True, allow_nan=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_name(label: str) -> str:
    """Return a readable and unique file name for a run.

    Args:
        label: Label of the run.
    """
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.").lower()[:80]
    return f"{readable}-{content_hash(label)[:6]}.json"


def write_result(path: Path, content: dict[str, Any], *, made_for: str) -> None:
    """Write a result atomically.

    Args:
        path: Path of the file.
        content: Plain values, all numbers finite.
        made_for: Hash of the run that the result belongs to.
    """
    envelope = {"format": FORMAT, "made_for": made_for, "digest": content_hash(content), "content": content}
    write_text(path, json.dumps(envelope, allow_nan=False, indent=1))


def read_result(path: Path, *, made_for: str | None) -> dict[str, Any] | None:
    """Return a result, or ``None`` if there is no file.

    Args:
        path: Path of the file.
        made_for: Hash of the run that the result must belong to; not checked if ``None``.

    Raises:
        UnusableResultError: If the file is damaged, or belongs to another run.
    """
    try:
        envelope = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UnusableResultError("damaged: it is not JSON") from error
    if not isinstance(envelope, dict) or not envelope.keys() >= {"format", "made_for", "digest", "content"}:
        raise UnusableResultError("damaged: entries are missing")
    if envelope["format"] != FORMAT:
        raise UnusableResultError(f"outdated: it has format {envelope['format']}, this version writes {FORMAT}")
    content: dict[str, Any] = envelope["content"]
    if content_hash(content) != envelope["digest"]:
        raise UnusableResultError("damaged: its content does not match its checksum")
    if made_for is not None and envelope["made_for"] != made_for:
        raise UnusableResultError("outdated: the study, its length or the package has changed since")
    return content
