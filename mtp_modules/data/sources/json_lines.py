"""Files of JSON lines."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_modules.core.checks import refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, FileHash
from mtp_modules.data.sources.files import JSON_LINES, FoundFile, find_files


class JsonLines(DocumentSource):
    """Files with one JSON object a line, each a document: a text, or the messages of a conversation.

    The split of a document, where shares are asked for, depends on its content, so equal ones are in one split.

    Args:
        paths: Files, folders (of which those that end in ``.jsonl`` or ``.ndjson`` are taken) or glob patterns.
        field: The field of each object that holds the text, or a list of messages, which
            :class:`~mtp_modules.data.Chat` reads.

    Raises:
        ValueError: In ``documents``, if a path does not exist, a line is not JSON, or has no such field.

    Example:
        >>> from mtp_modules.data import ByteTokenizer
        >>> path = getfixture("tmp_path") / "a.jsonl"
        >>> _ = path.write_text('{"text": "once"}', encoding="utf-8")
        >>> [(document.name, document.text) for document in JsonLines(paths=[str(path)]).documents(ByteTokenizer())]
        [('a.jsonl:1', 'once')]
    """

    def __init__(self, *, paths: Sequence[str], field: str = "text") -> None:
        self.paths, self.field = paths, field
        self.skipped = {}

    def files(self) -> list[FoundFile]:
        """Return the files, each once, in an order that is the same on every machine.

        Raises:
            ValueError: If a path does not exist, or holds no file.
        """
        return find_files(self, self.paths, JSON_LINES, self.skipped)

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield every line.

        Raises:
            ValueError: If a path does not exist, a line is not JSON, or has no such field.
        """
        del tokenizer
        self.skipped = {}
        for file in self.files():
            for number, record in records(self, file):
                name = f"{file.name}:{number}"
                if isinstance(record, dict) and record.get(self.field) in ("", None, []) and self.field in record:
                    self.skipped.setdefault("empty", []).append(name)
                else:
                    yield document_of(self, name, record, self.field)

    def fingerprint(self, hash_file: FileHash) -> str:
        """Return the field, and names and hashes of the files."""
        return "\n".join([self.field, *(f"{file.name} {hash_file(file.path)}" for file in self.files())])

    def size(self) -> int:
        """Return the bytes of the files."""
        return sum(file.path.stat().st_size for file in self.files())


def records(owner: object, file: FoundFile) -> Iterator[tuple[int, Any]]:
    """Yield number and content of every line of a file that is not blank.

    Args:
        owner: Named in errors.
        file: Of JSON lines.

    Raises:
        ValueError: If a line is not JSON.
    """
    with file.path.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            stripped = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not stripped:
                continue
            try:
                yield number, json.loads(stripped)
            except (ValueError, RecursionError):
                refuse(owner, f"line {number} of {str(file.path)!r} is not JSON; give one object a line.")


def document_of(owner: object, name: str, record: Any, field: str) -> Document:
    """Return the document that a record holds.

    Args:
        owner: Named in errors.
        name: Of the document.
        record: Fields by name.
        field: Name of the field with the text or the messages.

    Raises:
        ValueError: If the record has no such field, or it holds neither.
    """
    if not isinstance(record, dict) or field not in record:
        has = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else "is no object"
        refuse(owner, f"{name!r} has no field {field!r} (it {has}); name another field.")
    value = record[field]
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        refuse(owner, f"{name!r} holds half a character ({half!a}), which no tokenizer can read; repair the record.")
    if isinstance(value, str):
        return Document(name, text=value.replace("\r\n", "\n"), key=value)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return Document(name, messages=value, key=json.dumps(value, sort_keys=True, default=str))
    refuse(owner, f"field {field!r} of {name!r} holds neither a text nor messages, but {value!r:.60}.")


def field_of(owner: object, path: Path) -> str:
    """Return the field of a file that is used where none is named: ``text``, or the one with messages.

    Args:
        owner: Named in errors.
        path: Of the file.

    Raises:
        ValueError: If the first line has none of them.
    """
    _, first = next(records(owner, FoundFile(path, path.name)), (0, {}))
    known = ("text", "messages", "conversations")
    found = next((field for field in known if isinstance(first, dict) and field in first), None)
    if found is None:
        has = f"has {', '.join(map(repr, first))}" if isinstance(first, dict) and first else "is empty"
        refuse(
            owner,
            f"the first line of {str(path)!r} has none of the fields {', '.join(known)} (it {has}); "
            "give a JsonLines source and name its field.",
        )
    return found
