"""Tokenizers give back what they were given, and say what they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.core.component import build, describe
from mtp_modules.data import ByteTokenizer, WordTokenizer


@given(st.text())
def test_decode_inverts_encode(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens) == text


def test_torn_characters_become_the_replacement_character() -> None:
    assert ByteTokenizer().decode([195]) == "\ufffd"


def test_it_describes_itself() -> None:
    assert isinstance(build(describe(ByteTokenizer())), ByteTokenizer)
    assert (ByteTokenizer().vocab_size, ByteTokenizer().end_token) == (256, 0)


@given(st.lists(st.integers(0, 6)))
def test_words_read_back(tokens: list[int]) -> None:
    tokenizer = WordTokenizer(words=["the", "dog", "12", "_", ".", "!", "+"])
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "words must hold at least one word, got none"),
        (["two words"], "words must hold single words, got 'two words'; split it"),
        (["a", "b", "a"], "words must be different, got 'a' twice; leave one out"),
    ],
)
def test_lists_that_are_no_vocabulary_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WordTokenizer(words=words)


def test_unknown_words_are_refused() -> None:
    tokenizer = WordTokenizer(words=["a", "b"])
    with pytest.raises(ValueError, match=r"the word 'c' is unknown; use words of the 2 that it was made with"):
        tokenizer.encode("a c")
    with pytest.raises(ValueError, match=r"token 2 is outside the vocabulary 0..1"):
        tokenizer.decode([2])
