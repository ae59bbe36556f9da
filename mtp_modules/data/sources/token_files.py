"""Files of token ids, as the command ``sample`` writes them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mtp_modules.core.checks import refuse
from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data.documents import Document, DocumentSource, FileHash
from mtp_modules.data.sources.files import FoundFile, find_files
from mtp_modules.data.token_files import SUFFIX, read_documents


class TokenFiles(DocumentSource):
    """Documents of files of token ids, memory-mapped. No end token is added to them.

    Args:
        paths: Files (``NAME.bin``, with ``NAME.json`` beside each), folders or glob patterns.

    Raises:
        ValueError: In ``documents``, if a file does not exist or is damaged, or holds tokens of another vocabulary.
    """

    def __init__(self, *, paths: Sequence[str]) -> None:
        self.paths = paths
        self.skipped = {}

    def files(self) -> list[FoundFile]:
        """Return the files, each once, in an order that is the same on every machine.

        Raises:
            ValueError: If a path does not exist, or holds no file.
        """
        return find_files(self, self.paths, (SUFFIX,), {})

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yield the documents of every file.

        Raises:
            ValueError: If a file is damaged, or holds tokens of another vocabulary.
        """
        for file in self.files():
            documents, vocab_size = read_documents(file.path)
            if vocab_size != tokenizer.vocab_size:
                refuse(
                    self,
                    f"{file.path} holds tokens of a vocabulary of {vocab_size}, {type(tokenizer).__name__} has "
                    f"{tokenizer.vocab_size}; give the tokenizer that the tokens were sampled with.",
                )
            for index, tokens in enumerate(documents):
                yield Document(f"{file.name}/{index}", tokens=tokens)

    def fingerprint(self, hash_file: FileHash) -> str:
        """Return names and hashes of the files and their indexes."""
        lines = (f"{file.name} {hash_file(file.path)} {hash_file(_index(file))}" for file in self.files())
        return "\n".join(lines)

    def num_documents(self) -> int:
        """Return the number of documents of all files."""
        return sum(len(read_documents(file.path)[0]) for file in self.files())


def _index(file: FoundFile) -> Path:
    return file.path.with_suffix(".json")
