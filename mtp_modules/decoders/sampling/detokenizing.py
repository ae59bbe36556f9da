"""Tokens to text while they come: what is certain at once, what can still change later."""

from collections.abc import Sequence

from mtp_modules.core.interfaces import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no text."""

_LONGEST_CHARACTER = 4
_LONGEST_CONTEXT = 4
_LONGEST_BLANK_CONTEXT = 32
_PROMPT_TOKENS = 16


class StreamingDetokenizer:
    r"""Turn the tokens of one row into text, one token at a time.

    The pieces of text, one behind the other, are what the tokenizer decodes from the prompt with the output behind it,
    less the text of the prompt. So the space in front of the first word is kept, and a character whose first bytes are
    in the prompt counts as output. A piece never ends inside a character. Text is held back only while it ends with
    bytes that can still become a character; bytes that cannot come out as the replacement character, and what follows
    them comes out whole. A token that decodes to nothing, such as an id beyond the tokenizer's, changes nothing.

    The time a token takes does not depend on the length of the text. ``copy.copy`` makes a second detokenizer that goes
    on from the same place.

    Args:
        tokenizer: Turns tokens into text.
        prompt: The tokens that the output follows; only the last few are looked at.

    Example:
        >>> from mtp_modules.data import ByteTokenizer
        >>> text = StreamingDetokenizer(ByteTokenizer())
        >>> [text.push(token) for token in "né".encode() + b"\xe2"], text.pending, text.finish()
        (['n', '', 'é', ''], '�', '�')
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Copies share these, so nothing here may be changed in place.
        self._context: tuple[int, ...] = ()  # tokens whose text is out, up to a place between two characters
        self._context_text = ""
        self._held: tuple[int, ...] = ()  # tokens behind them, whose text can still change at its end
        self._held_text = ""
        self._given = ""  # as much of that as is out
        size = _PROMPT_TOKENS
        self._read_prompt(prompt[-size:])
        while not self._context and not self._held and size < len(prompt):  # all of them decode to nothing
            size *= 2
            self._read_prompt(prompt[-size:])
        self._given = self._held_text

    @property
    def pending(self) -> str:
        """The text of tokens that is held back, as it would come out now; replacement characters only."""
        return _without(self._held_text, self._given)

    def push(self, token: int) -> str:
        """Return the text that has become certain, which may be none.

        Args:
            token: The next token of the output.

        Raises:
            Exception: What the tokenizer raises for a token of its vocabulary.
        """
        held = (*self._held, token)
        try:
            text = self._tokenizer.decode([*self._context, *held])
        except Exception:  # tokenizers have errors of many kinds for ids that they do not have
            if token < self._tokenizer.vocab_size:
                raise
            return ""
        new = self._behind_context(text, held)
        if not new.endswith(REPLACEMENT):
            return self._release(held, text, new) if new or not self._is_silent(token) else ""
        if len(held) >= _LONGEST_CHARACTER:
            held = tuple(token for token in held if not self._is_silent(token))
        certain = len(new.rstrip(REPLACEMENT))
        if len(new) - certain > 1:
            released = self._release_last_character(held)
            if released is not None:
                return released
        return self._hold(held, new, certain)

    def finish(self) -> str:
        """Return the text that was held back, for no further token will change it."""
        left = self.pending
        self._held, self._held_text, self._given = (), "", ""
        return left

    def _read_prompt(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.push(int(token))

    def _read(self, tokens: tuple[int, ...]) -> tuple[str, str]:
        """Return the text of the context and of tokens behind it, and what of it is theirs."""
        text = self._tokenizer.decode([*self._context, *tokens])
        return text, self._behind_context(text, tokens)

    def _behind_context(self, text: str, tokens: tuple[int, ...]) -> str:
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        if REPLACEMENT in text:  # a tokenizer that gives up a whole run of bytes for a wrong one, those before it too
            return self._tokenizer.decode(list(tokens))
        return _without(text, self._context_text)

    def _is_silent(self, token: int) -> bool:
        """Say whether a token decodes to nothing wherever it stands: some spaces do at an end of the text only."""
        around, decode = self._context, self._tokenizer.decode
        return not decode([token]) and decode([*around, token, token, *around]) == decode([*around, *around])

    def _release(self, tokens: tuple[int, ...], text: str, new: str) -> str:
        """Give out all text, up to the last of some tokens; they become context."""
        fresh = _without(new, self._given) if self._given else new
        context = self._context + tokens
        if len(context) > _LONGEST_CONTEXT:
            alone = self._tokenizer.decode(list(tokens))
            # Some tokenizers leave spaces out at the beginning of a text, and would again behind a context of such.
            if alone or len(context) > _LONGEST_BLANK_CONTEXT:
                context, text = tokens, alone
        self._context, self._context_text = context, text
        if self._held:
            self._held, self._held_text, self._given = (), "", ""
        return fresh

    def _release_last_character(self, held: tuple[int, ...]) -> str | None:
        """Give out all text if the last tokens are a whole character by themselves, and broken with those before.

        Tokenizers that fall back to bytes write a replacement character for every byte of a run with a wrong one.
        """
        for count in range(1, min(len(held), _LONGEST_CHARACTER + 1)):
            text, character = self._read(held[-count:])
            if character and REPLACEMENT not in character:
                _, broken = self._read(held[:-count])
                return self._release(held[-count:], text, broken + character)
        return None

    def _hold(self, held: tuple[int, ...], new: str, certain: int) -> str:
        """Give out what is certain: the text of tokens too far back to be part of a character that is not whole yet."""
        old = held[: 1 - _LONGEST_CHARACTER]
        if old:
            certain = max(certain, min(len(self._read(old)[1]), len(new)))
        given, fresh = self._given, ""
        if not given.startswith(new[:certain]):
            given, fresh = new[:certain], _without(new[:certain], given)
        if len(held) > 2 * _LONGEST_CHARACTER:
            left = len(new) - len(given)
            held = held[-_LONGEST_CHARACTER:]
            _, new = self._read(held)
            given = new[: len(new) - left]
        self._held, self._held_text, self._given = held, new, given
        return fresh


def _without(text: str, beginning: str) -> str:
    """Return a text without another that it begins with; if it does not, without as much of that as it does."""
    if text.startswith(beginning):
        return text[len(beginning) :]
    agreed = (place for place, (one, other) in enumerate(zip(text, beginning, strict=False)) if one != other)
    return text[next(agreed, len(text)) :]
