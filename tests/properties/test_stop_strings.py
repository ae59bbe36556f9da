"""Stop strings are found in the text of the output, whatever the tokenizer, and end rows where they are complete."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder, Tokenizer
from mtp_modules.data import ByteTokenizer, WordTokenizer
from mtp_modules.decoders import BeamDecoder, Decoder, DraftedBeamDecoder, StopRule
from mtp_modules.decoders.sampling.stopping import REASONS, Endings, EndTable, StopMatcher
from tests.drafting import clock
from tests.properties.test_detokenizing import EACH, NO_TEXT, behind, draw_row
from tests.small_tokenizers import small_tokenizer


def ended(rule: StopRule, prompt: Sequence[int], output: Sequence[int]) -> int | None:
    """Return at how many tokens a row ends by its own words, as the decoders ask for it."""
    budget = len(output) + 1
    endings = Endings(EndTable([budget], None, [rule], 1 + max(output)), [rule], [prompt])
    counts, reasons, _ = endings.cut(np.array([output]), np.array([len(output)]))
    return int(counts[0]) if REASONS[reasons[0]] == "stop" else None


def first_end(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], strings: Sequence[str]) -> int | None:
    """Return after how many tokens the text of an output first holds a string."""
    texts = ((count, behind(tokenizer, prompt, output[:count])) for count in range(1, len(output) + 1))
    return next((count for count, text in texts if any(string in text for string in strings)), None)


@EACH
@settings(max_examples=2 * settings.default.max_examples)
@given(data=st.data())
def test_any_text_that_comes_out_can_be_waited_for(kind: str, data: st.DataObject) -> None:
    """It may begin and end inside tokens, with ids of no token between, and with the space of the first word."""
    tokenizer = small_tokenizer(kind)
    prompt, output = draw_row(data, kind)
    text = behind(tokenizer, prompt, output)
    assume(text)
    strings = []
    for _ in range(data.draw(st.integers(1, 2), label="strings")):
        start = data.draw(st.integers(0, len(text) - 1), label="start")
        strings.append(text[start : start + data.draw(st.integers(1, 12), label="length")])
    rule = StopRule(strings=strings, tokenizer=tokenizer)
    assert ended(rule, prompt, output) == first_end(tokenizer, prompt, output, strings) is not None


@EACH
@given(data=st.data())
def test_copies_watch_by_themselves(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    before, one = draw_row(data, kind)
    other = draw_row(data, kind)[1]
    texts = [behind(tokenizer, (), tokens) for tokens in ([*before, *one], other)]
    strings = [text[len(text) // 2 :][:5] for text in texts if text and NO_TEXT not in text]
    assume(strings)
    rule = StopRule(strings=strings, tokenizer=tokenizer)
    matcher = rule.new()
    for token in before:
        matcher.ends(token)
    twin = copy.copy(matcher)
    found = [(matcher.ends(a), twin.ends(b)) for a, b in zip(one, other, strict=False)]
    alone = [rule.new(), rule.new()]
    for token in before:
        assert alone[0].ends(token) == alone[1].ends(token)
    assert found == [(alone[0].ends(a), alone[1].ends(b)) for a, b in zip(one, other, strict=False)]


class Falling(StopRule):
    """Ends a row with the first token that is smaller than the one before, the last of the prompt too."""

    def new(self, prompt: Sequence[int] = ()) -> StopMatcher:
        class Matcher(StopMatcher):
            before = prompt[-1]

            def ends(self, token: int) -> bool:
                falls, self.before = token < self.before, token
                return falls

        return Matcher(self)


def test_rules_of_one_s_own_may_look_at_the_prompt() -> None:
    assert [ended(Falling(), prompt, [4, 7, 5]) for prompt in ([2, 5], [3], [7, 1])] == [1, 3, 3]


def test_a_string_ends_the_row_where_half_a_character_follows_in_the_same_token() -> None:
    tokenizer = small_tokenizer("byte-level")
    (token,) = (token for token in range(tokenizer.vocab_size) if tokenizer.decode([token, token]) == f"e{NO_TEXT}" * 2)
    for string in ("e", "xe"):
        rule = StopRule(strings=string, tokenizer=tokenizer)
        assert ended(rule, [], [*tokenizer.encode("x"), token, token]) == 2


def test_half_a_character_of_the_prompt_counts_when_the_output_completes_it() -> None:
    rule = StopRule(strings=["é"], tokenizer=ByteTokenizer())
    assert ended(rule, b"x\xc3", [0xA9, 0x41]) == 1
    assert ended(rule, "é".encode(), [0x41, 0x42]) is None


WORDS = ["b", "c", "d", "e", "f", "g", "h", "i", "j"]


@pytest.mark.parametrize(
    "decoder",
    [AutoregressiveDecoder(), SpeculativeDecoder(), BeamDecoder(num_beams=1), DraftedBeamDecoder(num_beams=1)],
    ids=lambda decoder: type(decoder).__name__,
)
def test_a_model_with_more_ids_than_the_tokenizer_goes_on(decoder: Decoder) -> None:
    """The clock goes round eleven tokens, of which the tokenizer has nine."""
    rule = StopRule(strings=["j b"], tokenizer=WordTokenizer(words=WORDS))
    generation = decoder.generate(clock(5), [[5], [8]], max_new_tokens=20, stop=rule)
    assert generation.tokens == [[6, 7, 8, 9, 10, 0], [9, 10, *range(9), 9, 10, 0]]
    assert generation.finish_reasons == ["stop", "stop"]


@pytest.mark.parametrize("decoder", [BeamDecoder(num_beams=2), DraftedBeamDecoder(num_beams=2)])
def test_beams_know_the_space_of_their_first_word(decoder: Decoder) -> None:
    rule = StopRule(strings=" c", tokenizer=WordTokenizer(words=WORDS))
    assert decoder.generate(clock(5), [[0], [8]], max_new_tokens=6, stop=rule).tokens[0] == [1]
