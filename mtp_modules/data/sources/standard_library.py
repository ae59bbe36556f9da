"""The standard library of the running interpreter: text that exists on every machine."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, FileHash
from mtp_modules.data.sources.files import FoundFile, files_below, read_text

# Some installations lack these folders; leaving them out gives the same text on every machine.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class StandardLibrary(DocumentSource):
    """The source files of the running Python's standard library, each a document; the tests among them are left out.

    The word ``stdlib`` in a list of sources means the same.
    """

    def __init__(self) -> None:
        self.skipped = {}

    def files(self) -> list[FoundFile]:
        """Return the files in the order of their names."""
        root = Path(sysconfig.get_paths()["stdlib"])
        return files_below(root, {}, lambda name: name.endswith(".py"), _LEFT_OUT)

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield every file."""
        del tokenizer
        self.skipped = {}
        for file in self.files():
            if text := read_text(self, file):
                yield Document(file.name, text=text)
            elif text is None:
                self.skipped.setdefault("that are not text", []).append(file.name)

    def fingerprint(self, hash_file: FileHash) -> str:
        """Return names and hashes of the files."""
        return "\n".join(f"{file.name} {hash_file(file.path)}" for file in self.files())

    def size(self) -> int:
        """Return the bytes of the files."""
        return sum(file.path.stat().st_size for file in self.files())
