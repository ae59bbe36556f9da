"""When rows end: by their own words, at their budgets, or where no position is left."""

from collections.abc import Collection, Sequence
from operator import index

import numpy as np

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.core.shapes import Array, Bool, Int

_BYTES_PER_CHARACTER = 4
_NO_LIMIT = 1 << 62
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"

REASONS = (None, "stop", "length", "context")
"""Why a row ends: by its own words, at its budget, or where the trunk has no position left; ``None`` if it goes on."""

GOES_ON, STOP, LENGTH, CONTEXT = range(len(REASONS))


class StopRule(Component):
    """End a row with the first of some tokens, or with the token that completes one of some strings.

    A rule of your own has another :meth:`new`, whose matcher may end a row earlier; the tokens end it in any case.

    Args:
        tokens: Token ids, an end-of-text token among them if there is one.
        strings: Texts; they may lie across tokens, and begin or end inside one.
        tokenizer: Turns tokens into text; needed with ``strings``.

    Raises:
        ValueError: If a token is no id; if a string is empty, cannot come out of the tokenizer, or holds the
            replacement character.
    """

    def __init__(
        self, *, tokens: Collection[int] = (), strings: Sequence[str] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        try:
            self.tokens = frozenset(map(index, tokens))
        except TypeError:
            refuse(self, f"tokens holds something that is no token id, got {list(tokens)}; leave it out.")
        self.strings, self.tokenizer = tuple(strings), tokenizer
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

    @property
    def watches(self) -> bool:
        """Whether a row has to be watched token by token, for strings or for what a subclass looks for."""
        return bool(self.strings) or type(self).new is not StopRule.new


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
        """Say which tokens stop their row.

        Args:
            tokens: Of every row, in any shape.
        """
        kind = self._kind.reshape(-1, *[1] * (tokens.ndim - 1))
        return self._stops[kind, tokens]

    def select(self, rows: Int[Array, " N"]) -> None:
        """Go on with some of the rows only.

        Args:
            rows: Which, in their new order.
        """
        self.most, self.at_most, self._kind = self.most[rows], self.at_most[rows], self._kind[rows]
        self.watched = self.watched[rows]
        self.any_watched = bool(self.watched.any())


class Endings:
    """Says where rows end, for all rows of a batch at once.

    Args:
        table: Of the rows; it goes with them from now on.
        rules: When each row ends by its own words.
    """

    def __init__(self, table: EndTable, rules: Sequence[StopRule]) -> None:
        self._table, self._left = table, table.most
        self._matchers = [rule.new() for rule in rules]
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
        """Go on with some of the rows only.

        Args:
            rows: Which, in their new order.
        """
        self._table.select(np.array(rows, dtype=np.int64))
        self._left = self._left[rows]
        self._matchers = list(map(self._matchers.__getitem__, rows))
        self._sure = 0
