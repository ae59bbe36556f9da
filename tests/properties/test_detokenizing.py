"""Text that comes token by token is the text of all tokens at once, for every kind of tokenizer, and comes in time."""

import copy
from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtp_modules import Tokenizer
from mtp_modules.decoders import StreamingDetokenizer
from tests.small_tokenizers import BYTE_KINDS, FALLBACK_KINDS, KINDS, byte_tokens, small_tokenizer, whole_tokens

NO_TEXT = "\ufffd"
EACH = pytest.mark.parametrize("kind", KINDS)
TEXTS = st.text(st.sampled_from("the dog cat barked.,!?'é→😀\n  ING12"), max_size=12)
BROKEN = bytes([0xFF, 0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0x98, 0x80, 0xA9, 0x41])


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    """Return the piece of every token, and what is left at the end."""
    text = StreamingDetokenizer(tokenizer, prompt=prompt)
    pieces = [text.push(token) for token in output]
    pieces.append(text.finish())
    assert text.pending == ""
    return pieces


def behind(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> str:
    """Return the text of the output: all text, less that of the prompt up to its last whole character."""
    whole, known = tokenizer.decode([*prompt, *output]), 0
    for count in range(len(prompt) + 1):
        text = tokenizer.decode(list(prompt[:count]))
        known = len(text) if NO_TEXT not in text else known
    return whole[max(known, agreed(tokenizer.decode(list(prompt)), whole)) :]


def agreed(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return max(count for count in range(len(one) + 1) if other.startswith(one[:count]))


def draw_row(data: st.DataObject, kind: str) -> tuple[list[int], list[int]]:
    """Draw a prompt and an output that are text together, cut anywhere, with ids of no token anywhere."""
    tokenizer = small_tokenizer(kind)
    single = st.sampled_from(whole_tokens(kind))
    parts = data.draw(st.lists(single if kind == "words" else st.one_of(TEXTS, single), max_size=8), label="parts")
    tokens = [token for part in parts for token in ([part] if isinstance(part, int) else tokenizer.encode(part))]
    assume(NO_TEXT not in tokenizer.decode(tokens))
    for place in data.draw(st.lists(st.integers(0, len(tokens)), max_size=3), label="places of no token"):
        tokens.insert(place, tokenizer.vocab_size + place % 3)
    cut = data.draw(st.integers(0, len(tokens)), label="length of the prompt")
    return tokens[:cut], tokens[cut:]


@EACH
@given(data=st.data())
def test_the_pieces_are_the_text_behind_the_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    prompt, output = draw_row(data, kind)
    assert "".join(streamed(tokenizer, prompt, output)) == behind(tokenizer, prompt, output)


@EACH
@given(data=st.data())
def test_all_text_is_out_wherever_it_is_whole(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    prompt, output = draw_row(data, kind)
    text, seen = StreamingDetokenizer(tokenizer, prompt=prompt), ""
    for count, token in enumerate(output, start=1):
        seen += text.push(token)
        if NO_TEXT not in tokenizer.decode([*prompt, *output[:count]]):
            assert (seen, text.pending) == (behind(tokenizer, prompt, output[:count]), "")
        else:
            assert NO_TEXT not in seen
            assert set(text.pending) <= {NO_TEXT}


@pytest.mark.parametrize("kind", BYTE_KINDS)
@given(data=st.data())
def test_any_bytes_become_what_they_are_by_utf_8(kind: str, data: st.DataObject) -> None:
    tokenizer, single = small_tokenizer(kind), byte_tokens(kind)
    tokens = st.one_of(st.sampled_from([single[byte] for byte in BROKEN]), st.integers(0, tokenizer.vocab_size + 2))
    prompt, output = (data.draw(st.lists(tokens, max_size=30), label=name) for name in ("prompt", "output"))
    whole, known = tokenizer.decode([*prompt, *output]), tokenizer.decode(prompt)
    assert "".join(streamed(tokenizer, prompt, output)) == whole[agreed(known, whole) :]


def repaired(kind: str, tokens: Sequence[int]) -> list[int]:
    """Return the same with the bytes of a replacement character in the place of every byte that is part of none."""
    single, found, place = byte_tokens(kind), [], 0
    tokens = [token for token in tokens if token < small_tokenizer(kind).vocab_size]
    while place < len(tokens):
        for count in range(1, 5):
            run = tokens[place : place + count]
            if all(token in single for token in run) and is_text(bytes(map(single.index, run))):
                break
        else:
            run = [single[byte] for byte in NO_TEXT.encode()] if tokens[place] in single else tokens[place : place + 1]
            count = 1
        found += run
        place += count
    return found


def is_text(run: bytes) -> bool:
    """Say whether bytes are whole characters."""
    return NO_TEXT not in run.decode(errors="replace")


@pytest.mark.parametrize("kind", FALLBACK_KINDS)
@given(data=st.data())
def test_any_bytes_of_a_fallback_spoil_no_character_beside_them(kind: str, data: st.DataObject) -> None:
    tokenizer, single = small_tokenizer(kind), byte_tokens(kind)
    character = st.sampled_from(["é", "→", "😀", "a"]).map(lambda one: [single[byte] for byte in one.encode()])
    token = st.one_of(st.sampled_from([single[byte] for byte in BROKEN]), st.integers(0, tokenizer.vocab_size + 2))
    parts = data.draw(st.lists(st.one_of(character, token.map(lambda one: [one])), max_size=14))
    tokens = [token for part in parts for token in part]
    cut = data.draw(st.integers(0, len(tokens)), label="length of the prompt")
    known, whole = (tokenizer.decode(repaired(kind, part)) for part in (tokens[:cut], tokens))
    assert "".join(streamed(tokenizer, tokens[:cut], tokens[cut:])) == whole[agreed(known, whole) :]


@pytest.mark.parametrize("kind", [*BYTE_KINDS, *FALLBACK_KINDS])
@given(garbage=st.lists(st.integers(0x80, 0xFF), max_size=20), known=st.sampled_from(["", "a", "é", "😀"]))
@example(garbage=[0xC3], known="é")
@example(garbage=[0xF0, 0x9F, 0x98], known="😀")
@example(garbage=[0xFF] * 20, known="")
def test_an_emoji_behind_garbage_is_whole(kind: str, garbage: list[int], known: str) -> None:
    tokenizer, single = small_tokenizer(kind), byte_tokens(kind)
    prompt, output = ([single[byte] for byte in run] for run in (known.encode(), [*garbage, *"😀".encode()]))
    pieces = streamed(tokenizer, prompt, output)
    assert pieces[-2].endswith("😀")
    assert pieces[-1] == ""


@EACH
@given(data=st.data())
def test_any_ids_come_out_and_raise_nothing(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    ids = st.integers(0, tokenizer.vocab_size + 5)
    prompt, output = (data.draw(st.lists(ids, max_size=40), label=name) for name in ("prompt", "output"))
    text = StreamingDetokenizer(tokenizer, prompt=prompt)
    for token in output:
        text.push(token)
        assert set(text.pending) <= {NO_TEXT}
    text.finish()
    assert text.pending == ""


@EACH
@given(data=st.data())
def test_copies_go_on_by_themselves(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)
    before, one, other = (data.draw(ids, label=name) for name in ("before", "one", "other"))
    text = StreamingDetokenizer(tokenizer)
    first = [text.push(token) for token in before]
    twin = copy.copy(text)
    assert [*first, *map(text.push, one), text.finish()] == streamed(tokenizer, (), [*before, *one])
    assert [*first, *map(twin.push, other), twin.finish()] == streamed(tokenizer, (), [*before, *other])
