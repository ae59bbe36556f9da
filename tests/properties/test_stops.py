"""Every way to end a row, at every place inside a block, for every way to draft.

The model goes round a circle of tokens, so its text is known. Rows begin at different tokens, so one batch has the end
at every place of a block.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder, Tokenizer
from mtp_modules.data import ByteTokenizer
from mtp_modules.decoders import Decoder, DynamicTree, Generation, PromptLookup, SamplingParams, StaticTree, StopRule
from mtp_modules.decoders.sampling.stopping import REASONS, Endings, EndTable, StopMatcher
from tests.drafting import clock

DECODERS: dict[str, Callable[[], Decoder]] = {
    "plain": AutoregressiveDecoder,
    "one draft": lambda: SpeculativeDecoder(num_drafts=1),
    "three drafts": lambda: SpeculativeDecoder(num_drafts=3),
    "four drafts": lambda: SpeculativeDecoder(num_drafts=4),
    "lookup": lambda: SpeculativeDecoder(drafter=PromptLookup(num_drafts=4)),
    "static tree": lambda: SpeculativeDecoder(tree=StaticTree(widths=[2, 2, 1, 1])),
    "dynamic tree": lambda: SpeculativeDecoder(tree=DynamicTree(depth=3, width=2, nodes=5)),
}
EACH = pytest.mark.parametrize("decoder", [pytest.param(make(), id=name) for name, make in DECODERS.items()])
WRONG_HALFWAY = (1, 2, 3, 9, 5)  # drafts are right up to depth 2


class Pieces(Tokenizer):
    """Tokens of several characters, so that a string can begin and end inside one."""

    def __init__(self, *, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def end_token(self) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        return [self.pieces.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces[token] for token in tokens)


def written(model_order: Sequence[int], prompt: Sequence[int], count: int) -> list[int]:
    """Return what the clock says after a prompt."""
    place = list(model_order).index(prompt[-1])
    return [model_order[(place + step) % len(model_order)] for step in range(1, count + 1)]


def cut(
    tokens: list[int],
    *,
    stop_tokens: Sequence[int] = (),
    strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    budget: int,
    room: int = 1 << 30,
) -> tuple[list[int], str]:
    """Return what should come out, one token at a time."""
    for count in range(1, len(tokens) + 1):
        so_far = tokens[:count]
        text = "" if tokenizer is None else tokenizer.decode(so_far)
        if so_far[-1] in stop_tokens or any(string in text for string in strings):
            return so_far, "stop"
        if count == budget:
            return so_far, "length"
        if count == room:
            return so_far, "context"
    raise AssertionError("the text is too short")


def check(generation: Generation, expected: list[tuple[list[int], str]]) -> None:
    assert list(zip(generation.tokens, generation.finish_reasons, strict=True)) == expected
    assert generation.stats.tokens == sum(len(tokens) for tokens, _ in expected)


ELEVEN = tuple(range(11))
TEXT = "né→😀!"  # characters of one to four bytes, no byte twice
BYTES = list(TEXT.encode())


def byte_order() -> list[int]:
    """A circle of all bytes, those of the text first."""
    return BYTES + [byte for byte in range(256) if byte not in BYTES]


@EACH
@pytest.mark.parametrize("stops", [[4], [7, 2]], ids=str)
@pytest.mark.parametrize("hands", [(1, 2, 3, 4, 5), WRONG_HALFWAY], ids=str)
def test_tokens_and_budgets(decoder: Decoder, stops: list[int], hands: tuple[int, ...]) -> None:
    pairs = [([token], budget) for token in ELEVEN for budget in (1, 2, 5, 11)]
    prompts, budgets = map(list, zip(*pairs, strict=True))
    expected = [cut(written(ELEVEN, p, 20), stop_tokens=stops, budget=budget) for p, budget in pairs]
    model = clock(5, hands=hands)
    check(decoder.generate(model, prompts, max_new_tokens=budgets, stop=StopRule(tokens=stops)), expected)


@EACH
def test_each_row_has_a_rule_and_a_budget_of_its_own(decoder: Decoder) -> None:
    prompts = [[token] for token in ELEVEN]
    stops, budgets = [[(5 * row) % 11] for row in ELEVEN], [1 + (7 * row) % 11 for row in ELEVEN]
    expected = [
        cut(written(ELEVEN, p, 20), stop_tokens=stop, budget=budget)
        for p, stop, budget in zip(prompts, stops, budgets, strict=True)
    ]
    rules = [StopRule(tokens=stop) for stop in stops]
    check(decoder.generate(clock(5), prompts, max_new_tokens=budgets, stop=rules), expected)


@EACH
@pytest.mark.parametrize("end", [0, 3, 10])
def test_the_end_of_the_context_and_stops_before_it(decoder: Decoder, end: int) -> None:
    model = clock(5)
    model.trunk.max_positions = 9
    prompts = [list(ELEVEN[:length]) for length in range(1, 10)]
    expected = [cut(written(ELEVEN, p, 20), stop_tokens=[end], budget=99, room=9 - len(p) + 1) for p in prompts]
    check(decoder.generate(model, prompts, max_new_tokens=99, stop=StopRule(tokens=[end])), expected)


class Falling(StopRule):
    """Ends a row with the first token that is smaller than the one before."""

    def new(self) -> StopMatcher:
        class Matcher(StopMatcher):
            before = -1

            def ends(self, token: int) -> bool:
                falls, self.before = token < self.before, token
                return falls

        return Matcher(self)


@EACH
def test_rules_of_one_s_own_are_asked_for_every_token(decoder: Decoder) -> None:
    texts = [written(ELEVEN, [token], 11) for token in ELEVEN]
    expected = [(text[: text.index(0) + 1], "stop") for text in texts]
    rules = [Falling() if row % 2 else StopRule(tokens=[0]) for row in ELEVEN]
    check(decoder.generate(clock(5), [[token] for token in ELEVEN], max_new_tokens=40, stop=rules), expected)


@EACH
def test_budgets_without_end_and_stops_that_no_token_is(decoder: Decoder) -> None:
    model = clock(5)
    model.trunk.max_positions = 9
    generation = decoder.generate(
        model, [[1], [2, 3]], max_new_tokens=[2**70, 2**63], stop=StopRule(tokens=[-1, 11, 2**80])
    )
    check(generation, [(written(ELEVEN, [1], 9), "context"), (written(ELEVEN, [3], 8), "context")])


SYLLABLES = Pieces(pieces=["a", "b", "ab", "ba", "c"])


@settings(max_examples=100)
@given(data=st.data())
def test_all_rows_at_once_end_where_each_would(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5), label="rows")
    each = partial(st.lists, min_size=rows, max_size=rows)
    texts = data.draw(each(st.lists(st.integers(0, 4), min_size=12, max_size=12)), label="texts")
    budgets, room = (data.draw(each(st.integers(1, 12)), label=name) for name in ("budgets", "room"))
    most_ends, most_strings = data.draw(st.sampled_from([(0, 0), (0, 0), (2, 0), (0, 1), (2, 1)]), label="ways to end")
    ends = data.draw(each(st.lists(st.integers(0, 4), max_size=most_ends)), label="ends")
    strings = data.draw(each(st.lists(st.sampled_from(["aba", "bb", "ac"]), max_size=most_strings)), label="strings")
    rules = [
        StopRule(tokens=end, strings=string, tokenizer=SYLLABLES) for end, string in zip(ends, strings, strict=True)
    ]
    expected = [
        cut(text, stop_tokens=end, strings=string, tokenizer=SYLLABLES, budget=budget, room=space)
        for text, end, string, budget, space in zip(texts, ends, strings, budgets, room, strict=True)
    ]
    endings = Endings(EndTable(budgets, room, rules, 5), rules)
    going, found, reasons = list(range(rows)), [[] for _ in texts], {}
    while going:
        width = data.draw(st.integers(1, 4), label="width")
        counts = data.draw(st.lists(st.integers(1, width), min_size=len(going), max_size=len(going)), label="counts")
        # What does not hold may look like an end.
        blocks = [[*texts[row][len(found[row]) :], 0, 1, 2, 3][:width] for row in going]
        counts = [min(count, 12 - len(found[row])) for row, count in zip(going, counts, strict=True)]
        kept, codes, any_ends = endings.cut(np.array(blocks), np.array(counts))
        for row, block, count, code in zip(going, blocks, kept.tolist(), codes.tolist(), strict=True):
            found[row] += block[:count]
            reasons[row] = REASONS[code]
        assert any_ends == any(reasons[row] for row in going)
        if any_ends:
            places = [place for place, row in enumerate(going) if reasons[row] is None][::-1]
            going = [going[place] for place in places]
            endings.select(places)
        if going:
            left = [min(budgets[row], room[row]) - len(found[row]) for row in going]
            assert endings.useful(2).tolist() == [min(2, count - 1) for count in left]
    assert [(text, reasons[row]) for row, text in enumerate(found)] == expected


def text_model(num_horizons: int = 5) -> MTPModel:
    return clock(num_horizons, order=byte_order())


@EACH
@pytest.mark.parametrize("string", ["n", "é", "→😀", "né→", "é→😀!", "!n"], ids=ascii)
def test_strings_of_characters_of_several_bytes(decoder: Decoder, string: str) -> None:
    """The text is written byte by byte, so its strings lie across tokens, and characters do too."""
    order, tokenizer = byte_order(), ByteTokenizer()
    prompts = [[order[-1 - back]] for back in range(6)]
    rule = StopRule(strings=[string, "never"], tokenizer=tokenizer)
    texts = [written(order, p, 60) for p in prompts]
    expected = [cut(text, strings=[string], tokenizer=tokenizer, budget=40) for text in texts]
    if string != "!n":  # which the text does not hold
        assert {reason for _, reason in expected} == {"stop"}
    check(decoder.generate(text_model(), prompts, max_new_tokens=40, stop=rule), expected)


PIECES = ["a", "b", "c", "ab", "ca", "bcab", "cc", "abc", "ba", "cab", "bb"]


@EACH
@settings(max_examples=settings.default.max_examples // 6)
@given(data=st.data())
def test_strings_that_begin_and_end_inside_tokens(decoder: Decoder, data: st.DataObject) -> None:
    tokenizer, order = Pieces(pieces=PIECES), data.draw(st.permutations(range(11)), label="order")
    prompts = [[order[place]] for place in range(0, 11, 2)]
    text = tokenizer.decode(written(order, prompts[0], 11))
    start = data.draw(st.integers(0, len(text) - 1), label="start")
    strings = [text[start : start + data.draw(st.integers(1, 9), label="length")]]
    rule = StopRule(strings=strings, tokens=[0], tokenizer=tokenizer)
    expected = [
        cut(written(order, p, 30), stop_tokens=[0], strings=strings, tokenizer=tokenizer, budget=25) for p in prompts
    ]
    check(decoder.generate(clock(5, order=order), prompts, max_new_tokens=25, stop=rule), expected)


@EACH
def test_what_the_prompt_says_stops_nothing(decoder: Decoder) -> None:
    order, tokenizer = byte_order(), ByteTokenizer()
    prompt, rest = BYTES[:2], BYTES[2:]
    rule = StopRule(strings=[TEXT[:1], TEXT[:2]], tokenizer=tokenizer)
    generation = decoder.generate(text_model(), [prompt], max_new_tokens=8, stop=rule)
    assert generation.finish_reasons == ["length"]
    assert generation.tokens[0] == written(order, prompt, 8)
    assert generation.tokens[0][:2] == rest[:2]


@EACH
def test_stops_hold_for_sampled_tokens(decoder: Decoder) -> None:
    params = SamplingParams(temperature=3.0)
    prompts = [[token] for token in ELEVEN]
    model = clock(5)
    whole = decoder.generate(model, prompts, max_new_tokens=30, sampling=params, seed=5).tokens
    expected = [cut([*row, *row], stop_tokens=[4, 9], budget=30) for row in whole]
    generation = decoder.generate(
        model, prompts, max_new_tokens=30, sampling=params, seed=5, stop=StopRule(tokens=[4, 9])
    )
    check(generation, expected)
    assert len({len(row) for row in generation.tokens}) > 4


def test_a_stop_beats_a_budget_and_the_context_at_the_same_token() -> None:
    model = clock(5)
    model.trunk.max_positions = 4
    for budget in (4, 99):
        generation = SpeculativeDecoder().generate(model, [[0]], max_new_tokens=budget, stop=StopRule(tokens=[4]))
        assert (generation.tokens, generation.finish_reasons) == ([[1, 2, 3, 4]], ["stop"])
