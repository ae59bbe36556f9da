"""What a detokenizer gives out at each token, and what it asks of the tokenizer."""

from collections.abc import Sequence

import pytest

from mtp_modules import Tokenizer
from mtp_modules.data import ByteTokenizer
from mtp_modules.decoders import StreamingDetokenizer
from tests.small_tokenizers import Spelled, SpelledBytes, byte_tokens, small_tokenizer


def pieces(tokenizer: Tokenizer, output: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    text = StreamingDetokenizer(tokenizer, prompt=prompt)
    return [*map(text.push, output), text.finish()]


class Stripped(Spelled):
    """Leaves spaces out at both ends."""

    def decode(self, tokens: list[int]) -> str:
        return super().decode(tokens).strip()


class Tidy(Spelled):
    """Takes a space back when a comma follows."""

    def decode(self, tokens: list[int]) -> str:
        return super().decode(tokens).replace(" ,", ",")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("aé→😀".encode(), ["a", "", "é", "", "", "→", "", "", "", "😀", ""]),
        (b"\xff" * 5, ["", "", "", "\ufffd", "\ufffd", "\ufffd" * 3]),
        (b"\xc3a", ["", "\ufffda", ""]),
        (b"\xe2\x82", ["", "", "\ufffd"]),
        (b"\xe2\x82\xe2\x82\xac", ["", "", "", "\ufffd", "€", ""]),
        ("\ufffdb".encode(), ["", "", "", "\ufffdb", ""]),
    ],
    ids=["characters", "no text", "broken", "half", "half and whole", "genuine"],
)
def test_bytes_come_out_as_soon_as_they_are_certain(run: bytes, expected: list[str]) -> None:
    assert pieces(ByteTokenizer(), run) == expected


@pytest.mark.parametrize("kind", ["fallback-bpe", "fallback-unigram"])
def test_a_fallback_keeps_characters_beside_broken_ones(kind: str) -> None:
    tokenizer, single = small_tokenizer(kind), byte_tokens(kind)
    output = [single[byte] for byte in "é".encode() + b"\xff" + "é".encode() + b"\xc3" + "😀".encode() + b"\xe2"]
    dog = tokenizer.encode("dog")
    assert "\ufffd" * 7 in tokenizer.decode(output)
    assert pieces(tokenizer, [*output, *dog]) == (
        ["", "é", "", "", "\ufffdé", "", "", "", "\ufffd", "😀", "", "\ufffd dog", *[""] * len(dog)]
    )


def test_text_before_a_half_character_in_the_same_token_is_out_at_once() -> None:
    tokenizer = SpelledBytes(texts=["a\xc3", "\xa9b\xe2", "\x82\xac"])
    assert pieces(tokenizer, [0, 1, 2]) == ["a", "éb", "€", ""]
    assert pieces(tokenizer, [0, 0]) == ["a", "\ufffda", "\ufffd"]
    text = StreamingDetokenizer(tokenizer)
    text.push(0)
    assert text.pending == "\ufffd"


def test_a_character_that_the_prompt_begins_is_output() -> None:
    tokenizer = ByteTokenizer()
    assert pieces(tokenizer, b"\xa9!", prompt=b"n\xc3") == ["é", "!", ""]
    assert pieces(tokenizer, b"!", prompt=b"n\xc3") == ["!", ""]
    assert pieces(tokenizer, b"", prompt=b"n\xc3") == [""]


@pytest.mark.parametrize("kind", ["words", "unigram", "fallback-bpe", "word-level", "word-piece"])
def test_the_first_word_keeps_its_space(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    dog = tokenizer.encode("dog")
    assert "".join(pieces(tokenizer, dog)) == "dog"
    assert "".join(pieces(tokenizer, dog, prompt=tokenizer.encode("the"))) == " dog"


def test_parts_of_words_have_no_space() -> None:
    tokenizer = small_tokenizer("word-piece")
    bark, ing = tokenizer.encode("barking")
    assert pieces(tokenizer, [ing], prompt=[bark]) == ["ing", ""]


@pytest.mark.parametrize("kind", ["bytes", "words", "fallback-bpe", "word-piece"])
def test_ids_of_no_token_are_nothing(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    dog, cat, none = tokenizer.encode("dog"), tokenizer.encode("cat"), tokenizer.vocab_size
    plain = pieces(tokenizer, [*dog, *cat])
    assert pieces(tokenizer, [none, *dog, none, none + 7, *cat]) == ["", *plain[: len(dog)], "", "", *plain[len(dog) :]]
    assert "".join(pieces(tokenizer, cat, prompt=[*dog, *[none] * 40])) == "".join(plain)[len("dog") :]


def test_ids_of_no_token_inside_a_character_are_nothing() -> None:
    assert pieces(ByteTokenizer(), [0xE2, 300, 0x82, *[300] * 20, 0xAC]) == [*[""] * 23, "€", ""]


def test_an_error_for_an_id_of_no_token_is_nothing_and_any_other_is_passed_on() -> None:
    tokenizer = Spelled(texts=["a", "b"])
    assert pieces(tokenizer, [0, 7, 1]) == ["a", "", "b", ""]
    text = StreamingDetokenizer(tokenizer)
    tokenizer.texts = tokenizer.texts[:1]
    assert text.push(1) == ""
    with pytest.raises(TypeError):
        StreamingDetokenizer(Spelled(texts=["a", None])).push(1)


def test_a_tokenizer_that_leaves_spaces_out_at_the_ends() -> None:
    tokenizer = Stripped(texts=["a", " ", "b", ""])
    assert pieces(tokenizer, [1, 0, 1, 3, 1, 2, 1]) == ["", "a", "", "", "", "  b", "", ""]
    assert pieces(tokenizer, [2], prompt=[0, 1]) == [" b", ""]
    assert "".join(pieces(tokenizer, [0, *[1] * 30, 2] * 3)) == f"a{'':30}b" * 3


def test_text_that_is_out_is_not_taken_back() -> None:
    assert pieces(Tidy(texts=["a", " ", ","]), [0, 1, 2, 0]) == ["a", " ", ",", "a", ""]


@pytest.mark.parametrize(
    "texts",
    [["a"], ["\xff"], ["\x82\xe2"], ["\xe2\x82", "\xac"], [" "], [""], ["a\xc3"], ["a", "\xff", "", " "]],
    ids=ascii,
)
def test_a_token_costs_the_same_anywhere(texts: list[str]) -> None:
    tokenizer = SpelledBytes(texts=texts)
    text = StreamingDetokenizer(tokenizer, prompt=[0] * 1000)
    count = 2000
    for place in range(count):
        text.push(place % len(texts))
    assert tokenizer.looked_at < 60 * count
