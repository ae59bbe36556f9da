"""Whether a tokenizer can write a string at all, in the middle of any text."""

from collections.abc import Iterable, Iterator

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.decoders.sampling.detokenizing import REPLACEMENT


def can_write(tokenizer: Tokenizer, string: str) -> bool:
    """Say whether the text of some tokens holds a string.

    What the tokenizer reads and writes back is enough, for almost any string: behind itself too, where spaces at the
    ends are kept. Other strings are put together from the texts of all tokens.

    Args:
        tokenizer: Turns text into tokens and back.
        string: The string, not empty.
    """
    tokens = _encoded(tokenizer, string)
    if string in tokenizer.decode([*tokens, *tokens, *tokens]):
        return True
    alone = {text for _, text in _decoded(tokenizer, ((token,) for token in range(tokenizer.vocab_size)))}
    return _in_a_row(string, alone, set(_texts(tokenizer, string)))


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except Exception:  # tokenizers have errors of many kinds for text that they do not know
        return []


def _texts(tokenizer: Tokenizer, string: str) -> Iterator[str]:
    """Yield what can stand behind other text: every token, and the few tokens that are a character of the string."""
    known = _decoded(tokenizer, ((token,) for token in range(tokenizer.vocab_size)))
    first, before = next(((tokens, text) for tokens, text in known if REPLACEMENT not in text), ((), ""))
    single = ((*first, token) for token in range(tokenizer.vocab_size))
    encoded = [_encoded(tokenizer, character) for character in set(string)]
    parts = (
        (*first, *tokens[start:end])
        for tokens in encoded
        for start in range(len(tokens))
        for end in range(start + 2, len(tokens) + 1)
    )
    for candidates in (single, parts):
        for _, text in _decoded(tokenizer, candidates):
            if text.startswith(before):
                yield text[len(before) :]


def _decoded(tokenizer: Tokenizer, candidates: Iterable[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield tokens with their text, where there is one."""
    for tokens in candidates:
        try:
            text = tokenizer.decode(list(tokens))
        except Exception:  # an id that the tokenizer does not have
            continue
        if text:
            yield tokens, text


def _in_a_row(string: str, alone: set[str], texts: set[str]) -> bool:
    """Say whether one text that stands at the beginning or behind others, and others behind it, hold a string."""
    first = alone | texts
    if any(string in text for text in first):
        return True
    places = range(1, len(string))
    reached = {place for place in places if any(text.endswith(string[:place]) for text in first)}
    for place in places:
        if place in reached:
            reached |= {end for end in range(place + 1, len(string) + 1) if string[place:end] in texts}
    return any(text.startswith(string[place:]) for place in reached for text in texts)
