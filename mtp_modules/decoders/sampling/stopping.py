"""When rows end: by their own words, at their budgets, or where no position is left."""

import copy
import inspect
from collections.abc import Collection, Sequence
from operator import index
from typing import Any, SupportsIndex

import numpy as np

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.detokenizing import REPLACEMENT, StreamingDetokenizer
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.shapes import Array, Bool, Int
from mtp_modules.core.writable import can_write

_NO_LIMIT = 1 << 62

REASONS = (None, "stop", "length", "context")
"""Why a row ends: by its own words, at its budget, or where the trunk has no position left; ``None`` if it goes on."""

GOES_ON, STOP, LENGTH, CONTEXT = range(len(REASONS))


class StopRule(Component):
    """End a row with the first of some tokens, or with the token that completes one of some strings.

    Strings are looked for in the text of the output, never in that of the prompt. Tokens that decode to nothing may lie
    between those of a string.

    A rule of your own has another :meth:`new`, whose matcher may end a row earlier; the tokens end it in any case.

    Args:
        tokens: Token ids, or a single one; an end-of-text token among them if there is one.
        strings: Texts, or a single one; they may lie across tokens, and begin or end inside one.
        tokenizer: Turns tokens into text; needed with ``strings``.

    Raises:
        ValueError: If a token is no id; if a string is no text, is empty, cannot come out of the tokenizer, or holds
            the replacement character.
    """

    def __init__(
        self,
        *,
        tokens: Collection[SupportsIndex] | SupportsIndex = (),
        strings: Collection[str] | str = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.tokens = _ids(self, tokens)
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        self.tokenizer = tokenizer
        if self.strings and tokenizer is None:
            refuse(self, "strings need a tokenizer that turns tokens into text; give tokenizer.")
        for string in self.strings:
            if not isinstance(string, str):
                refuse(self, f"strings holds {string!r}, which is no text; give tokens in tokens.")
            if not string:
                refuse(self, "strings holds an empty string, which would end every row; leave it out.")
            if REPLACEMENT in string:
                refuse(
                    self,
                    f"strings holds {string!r}, with the replacement character, which stands for any bytes that are no "
                    "text, halves of characters too; leave it out.",
                )
            assert tokenizer is not None
            if not can_write(tokenizer, string):
                refuse(
                    self, f"strings holds {string!r}, which the tokenizer cannot write; give a text that it can encode."
                )

    def new(self, prompt: Sequence[int] = ()) -> "StopMatcher":
        """Start to watch a row. A rule of your own may leave the prompt out.

        Args:
            prompt: What the row's output follows.
        """
        return StopMatcher(self, prompt)

    @property
    def watches(self) -> bool:
        """Whether a row has to be watched token by token, for strings or for what a subclass looks for."""
        return bool(self.strings) or type(self).new is not StopRule.new


def _ids(rule: StopRule, tokens: Any) -> frozenset[int]:
    """Return token ids as plain numbers."""
    try:
        return frozenset([_id(tokens)])
    except TypeError:
        pass
    try:
        several = list(tokens)
    except TypeError:
        refuse(rule, f"tokens must be token ids, got {tokens!r}; give a list of whole numbers.")
    try:
        return frozenset(map(_id, several))
    except TypeError:
        refuse(rule, f"tokens holds something that is no token id, got {several}; leave it out.")


def _id(token: Any) -> int:
    if isinstance(token, bool):
        raise TypeError
    return index(token)


class StopMatcher:
    """Watches the tokens of one row. Copies go on from the same place.

    Args:
        rule: What to watch for.
        prompt: What the row's output follows.
    """

    def __init__(self, rule: StopRule, prompt: Sequence[int] = ()) -> None:
        self.rule = rule
        self._text: StreamingDetokenizer | None = None
        self._tail = ""  # of the text so far: a string may begin there
        self._longest_tail = max((len(string) for string in rule.strings), default=1) - 1
        if rule.strings:
            assert rule.tokenizer is not None
            self._text = StreamingDetokenizer(rule.tokenizer, prompt=prompt)

    def __copy__(self) -> "StopMatcher":
        """Return one that goes on from the same place."""
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__ | {"_text": copy.copy(self._text)}
        return twin

    def ends(self, token: int) -> bool:
        """Say whether this token ends the row.

        Args:
            token: The next token of the output.
        """
        if token in self.rule.tokens:
            return True
        new = "" if self._text is None else self._text.push(token)
        if not new:
            return False
        text = self._tail + new
        self._tail = text[len(text) - self._longest_tail :] if self._longest_tail < len(text) else text
        return any(string in text for string in self.rule.strings)


def matchers_of(rules: Sequence[StopRule], prompts: Sequence[Sequence[int]] | None) -> list[StopMatcher]:
    """Start to watch rows.

    Args:
        rules: When each row ends by its own words.
        prompts: What each row's output follows; ``None`` if unknown.
    """
    if prompts is None:
        return [rule.new() for rule in rules]
    return [
        rule.new(prompt) if _reads_prompt(type(rule)) else rule.new()
        for rule, prompt in zip(rules, prompts, strict=True)
    ]


def _reads_prompt(kind: type[StopRule]) -> bool:
    return kind.new is StopRule.new or len(inspect.signature(kind.new).parameters) > 1


class EndTable:
    """Where rows end, in tables over all of them: the most tokens that each may emit, and the tokens that stop it.

    Args:
        budgets: Most tokens that each row may emit.
        room: Most tokens that each row can emit before the trunk has no position left; ``None`` for no limit.
        rules: When each row ends by its own words.
        vocab_size: Number ``V`` of token ids.

    Attributes:
        most: Most tokens of each row, by the budget and by the room.
        at_most: Why it ends there, the place of the reason in :data:`REASONS`.
        has_stops: Whether any row has stop tokens.
        watched: Whether a row has to be watched token by token, for its rule says more than which tokens stop it.
        any_watched: Whether any has to be.
    """

    def __init__(
        self, budgets: Sequence[int], room: Sequence[int] | None, rules: Sequence[StopRule], vocab_size: int
    ) -> None:
        most = np.array([min(budget, _NO_LIMIT) for budget in budgets])
        self.most: Int[Array, " B"] = most if room is None else np.minimum(most, np.array(room))
        self.at_most: Int[Array, " B"] = np.where(self.most < most, CONTEXT, LENGTH)
        kinds = {tokens: kind for kind, tokens in enumerate({rule.tokens for rule in rules})}
        self._stops: Bool[Array, "N V"] = np.zeros((len(kinds), vocab_size), dtype=bool)
        for tokens, kind in kinds.items():
            self._stops[kind, [token for token in tokens if 0 <= token < vocab_size]] = True
        self._kind: Int[Array, " B"] = np.array([kinds[rule.tokens] for rule in rules])
        self.has_stops = bool(self._stops.any())
        self.watched: Bool[Array, " B"] = np.array([rule.watches for rule in rules])
        self.any_watched = bool(self.watched.any())

    def stops(self, tokens: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
        """Say which tokens stop their row."""
        kind = self._kind.reshape(-1, *[1] * (tokens.ndim - 1))
        return self._stops[kind, tokens]

    def select(self, rows: Int[Array, " N"]) -> None:
        """Go on with some of the rows only."""
        self.most, self.at_most, self._kind = self.most[rows], self.at_most[rows], self._kind[rows]
        self.watched = self.watched[rows]
        self.any_watched = bool(self.watched.any())


class Endings:
    """Says where rows end, for all rows of a batch at once.

    Args:
        table: Of the rows; it goes with them from now on.
        rules: When each row ends by its own words.
        prompts: What each row's output follows; ``None`` if unknown.
    """

    def __init__(
        self, table: EndTable, rules: Sequence[StopRule], prompts: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._table, self._left = table, table.most
        self._matchers = matchers_of(rules, prompts)
        self._sure = 0

    def cut(
        self, tokens: Int[Array, "B C"], counts: Int[Array, " B"]
    ) -> tuple[Int[Array, " B"], Int[Array, " B"], bool]:
        """Cut at the budget, and after the first token within it that ends the row. To be called once a round.

        Args:
            tokens: New tokens.
            counts: How many of them are to come out, at least 1 a row.

        Returns:
            How many do come out, the place of the reason in :data:`REASONS`, and whether any row ends.
        """
        table = self._table
        before, self._left = self._left, self._left - counts
        self._sure -= tokens.shape[1]  # no row has emitted more
        if self._sure < 1:
            self._sure = int(self._left.min())  # so many tokens each row may still emit
        stops = table.stops(tokens) if table.has_stops else None
        if self._sure > 0 and not table.any_watched and (stops is None or not stops.any()):
            return counts, np.full(len(counts), GOES_ON), False
        counts = np.minimum(counts, before)
        reasons = np.where(counts == before, table.at_most, GOES_ON)
        if stops is not None:
            first = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, tokens.shape[1] + 1)
            reasons[first <= counts] = STOP
            counts = np.minimum(counts, first)
        if table.any_watched:
            self._watch(tokens, counts, reasons)
        return counts, reasons, bool(reasons.any())

    def _watch(self, tokens: Int[Array, "B C"], counts: Int[Array, " B"], reasons: Int[Array, " B"]) -> None:
        """Cut after the first token that a matcher says ends the row; tokenizers take one row at a time."""
        for row in np.flatnonzero(self._table.watched).tolist():
            for place, token in enumerate(tokens[row, : counts[row]].tolist()):
                if self._matchers[row].ends(token):
                    counts[row], reasons[row] = place + 1, STOP
                    break

    def useful(self, wanted: int) -> Int[Array, " B"]:
        """Return how many drafts of each row can be of use: the model's own token comes behind them.

        Args:
            wanted: Most.
        """
        return np.minimum(self._left - 1, wanted)

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only."""
        self._table.select(np.array(rows, dtype=np.int64))
        self._left = self._left[rows]
        self._matchers = list(map(self._matchers.__getitem__, rows))
        self._sure = 0
