"""The contract of tokenizers."""

from abc import ABC, abstractmethod

from mtp_modules.core.component import Component


class Tokenizer(Component, ABC):
    """Turns text into token ids and back."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number ``V`` of token ids."""

    @property
    @abstractmethod
    def end_token(self) -> int | None:
        """The id that ends a document, or ``None``."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids; bytes that are no text become the replacement character."""
