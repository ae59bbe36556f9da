"""Files of text."""

from collections.abc import Iterator, Sequence

from mtp_modules.core.checks import refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, FileHash
from mtp_modules.data.sources.files import JSON_LINES, FoundFile, find_files, read_text


class TextFiles(DocumentSource):
    """Files of text, each a document. A folder takes what is text; what is left out is said.

    Symbolic links are followed, and byte-order marks dropped. Files and folders whose names begin with a dot are left
    out.

    Args:
        paths: Files, folders or glob patterns.
        suffixes: Which files of a folder to take, such as ``[".txt"]``; all that are text if ``None``.

    Raises:
        ValueError: In ``documents``, if a path does not exist or holds no file, or a file that is named is not text.

    Example:
        >>> from mtp_modules.data import ByteTokenizer
        >>> _ = (getfixture("tmp_path") / "a.txt").write_text("once", encoding="utf-8")
        >>> source = TextFiles(paths=[str(getfixture("tmp_path"))])
        >>> [(document.name, document.text) for document in source.documents(ByteTokenizer())]
        [('a.txt', 'once')]
    """

    def __init__(self, *, paths: Sequence[str], suffixes: Sequence[str] | None = None) -> None:
        self.paths, self.suffixes = paths, suffixes
        self.skipped = {}

    def files(self) -> list[FoundFile]:
        """Return the files, each once, in an order that is the same on every machine.

        Raises:
            ValueError: If a path does not exist, or holds no file.
        """
        found = find_files(self, self.paths, self.suffixes, self.skipped)
        if self.suffixes is not None:
            return found
        records = [file for file in found if file.name.endswith(JSON_LINES) and not file.required]
        if records and len(records) == len(found):
            refuse(self, f"{records[0].name!r} and all other files there are JSON lines; give a JsonLines source.")
        for file in records:
            self.skipped.setdefault("of JSON lines, which a JsonLines source reads", []).append(file.name)
        return [file for file in found if file not in records]

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield every file that is text.

        Raises:
            ValueError: If a path does not exist or holds no file, or a file that is named is not text.
        """
        del tokenizer
        self.skipped = {}
        for file in self.files():
            text = read_text(self, file)
            if text is None or text == "":
                self.skipped.setdefault("that are not text" if text is None else "empty", []).append(file.name)
            else:
                yield Document(file.name, text=text)

    def fingerprint(self, hash_file: FileHash) -> str:
        """Return names and hashes of the files."""
        return "\n".join(f"{file.name} {hash_file(file.path)}" for file in self.files())

    def size(self) -> int:
        """Return the bytes of the files."""
        return sum(file.path.stat().st_size for file in self.files())
