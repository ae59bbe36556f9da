"""When a row ends by its own words."""

from collections.abc import Collection, Sequence

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Tokenizer

_BYTES_PER_CHARACTER = 4
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"


class StopRule(Component):
    """End a row with the first of some tokens, or with the token that completes one of some strings.

    Args:
        tokens: Token ids, an end-of-text token among them if there is one.
        strings: Texts; they may lie across tokens, and begin or end inside one.
        tokenizer: Turns tokens into text; needed with ``strings``.

    Raises:
        ValueError: If a string is empty, cannot come out of the tokenizer, or holds the replacement character.
    """

    def __init__(
        self, *, tokens: Collection[int] = (), strings: Sequence[str] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        self.tokens, self.strings, self.tokenizer = frozenset(tokens), tuple(strings), tokenizer
        if self.strings and tokenizer is None:
            refuse(self, "strings need a tokenizer that turns tokens into text; give tokenizer.")
        for string in self.strings:
            if not string:
                refuse(self, "strings holds an empty string, which would end every row; leave it out.")
            if _NO_TEXT in string:
                refuse(
                    self,
                    f"strings holds {string!r}, with the replacement character, which stands for any bytes that are no "
                    "text, halves of characters too; leave it out.",
                )
            assert tokenizer is not None
            if not _writes(tokenizer, string):
                refuse(
                    self, f"strings holds {string!r}, which the tokenizer cannot write; give a text that it can encode."
                )

    def new(self) -> "StopMatcher":
        """Start to watch a row."""
        return StopMatcher(self)


def _writes(tokenizer: Tokenizer, string: str) -> bool:
    try:
        return tokenizer.decode(tokenizer.encode(string)) == string
    except (ValueError, LookupError):  # how tokenizers say that a text has characters that they do not know
        return False


class StopMatcher:
    """Watches the tokens of one row.

    Args:
        rule: What to watch for.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        longest = max((len(string) for string in rule.strings), default=0)
        self._most = _BYTES_PER_CHARACTER * (longest + 1)
        self._recent: list[int] = []

    def ends(self, token: int) -> bool:
        """Say whether this token ends the row.

        Args:
            token: The next token of the output.
        """
        if token in self.rule.tokens:
            return True
        if not self.rule.strings:
            return False
        assert self.rule.tokenizer is not None
        self._recent = [*self._recent[-self._most :], token]
        text = self.rule.tokenizer.decode(self._recent)
        return any(string in text for string in self.rule.strings)


def cut(tokens: list[int], budget: int, matcher: StopMatcher) -> tuple[list[int], str | None]:
    """Cut at the budget, and after the first token within it that ends the row.

    Args:
        tokens: New tokens of a row.
        budget: Most of them that the row may emit.
        matcher: Of the row.

    Returns:
        What is left, and why the row ends there, ``"stop"`` or ``"length"``; ``None`` if it goes on.
    """
    tokens = tokens[:budget]
    for index, token in enumerate(tokens):
        if matcher.ends(token):
            return tokens[: index + 1], "stop"
    return tokens, "length" if len(tokens) == budget else None
