"""Tokenizers: text to token ids and back."""

from mtp_modules.core.interfaces import Tokenizer


class ByteTokenizer(Tokenizer):
    """Read text as its UTF-8 bytes: no training, no files, nothing is out of vocabulary.

    Byte 0, which text does not contain, ends a document.

    Example:
        >>> tokens = ByteTokenizer().encode("né")
        >>> tokens, ByteTokenizer().decode(tokens)
        ([110, 195, 169], 'né')
    """

    @property
    def vocab_size(self) -> int:
        """256, the values of a byte."""
        return 256

    @property
    def end_token(self) -> int:
        """0, the NUL byte."""
        return 0

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: list[int]) -> str:
        """Return the text of bytes; what is no UTF-8 becomes the replacement character.

        Raises:
            ValueError: If a token is no byte.
        """
        return bytes(tokens).decode("utf-8", errors="replace")
