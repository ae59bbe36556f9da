"""The byte tokenizer gives back what it was given, and says what it is."""

from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.core.component import build, describe
from mtp_modules.data import ByteTokenizer


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
