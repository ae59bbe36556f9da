"""Tokenizers give back what they were given, and say what they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import Tokenizer
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


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WordTokenizer(words=["a", "b", "."])], ids=["bytes", "words"])
def test_ids_of_no_token_decode_to_nothing_and_negative_ones_are_refused(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    assert tokenizer.decode([size, 0, size + 5, 1, 2**70, 2]) == tokenizer.decode([0, 1, 2])
    assert tokenizer.decode([size]) == tokenizer.decode([]) == ""
    sentence = rf"^{type(tokenizer).__name__}: token -2 is negative; give ids of the vocabulary 0\.\.{size - 1}\.$"
    with pytest.raises(ValueError, match=sentence):
        tokenizer.decode([size, -2, 0])
