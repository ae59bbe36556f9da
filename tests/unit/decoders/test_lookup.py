"""Lookup in the text against a search by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.decoders import LookupOrHeads, PromptLookup
from mtp_modules.decoders.drafting.text import Text
from tests.drafting import clock
from tests.helpers import make_model


def found_by_hand(text: list[int], num_drafts: int, longest: int, shortest: int) -> list[int]:
    """Return what followed the longest tail at the latest place where it stood before."""
    for ngram in range(longest, shortest - 1, -1):
        for start in range(len(text) - ngram - 1, -1, -1):
            if text[start : start + ngram] == text[len(text) - ngram :]:
                return text[start + ngram : start + ngram + num_drafts]
    return []


@settings(max_examples=8 * settings.default.max_examples)
@given(data=st.data())
def test_lookup_finds_the_latest_of_the_longest_matches(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=3))
    shortest = data.draw(st.integers(1, 3), label="shortest")
    longest = data.draw(st.integers(shortest, 4), label="longest")
    num_drafts = data.draw(st.integers(1, 5), label="K")
    text = Text(len(rows), 12 + data.draw(st.integers(0, 3), label="room"), torch.device("cpu"))
    padded = torch.tensor([[*row, *[2] * (12 - len(row))] for row in rows])
    cut = data.draw(st.integers(0, 12), label="cut")  # written in two parts
    first = torch.tensor([min(cut, len(row)) for row in rows])
    text.append(padded, first)
    second = torch.stack([row.roll(-int(count)) for row, count in zip(padded, first, strict=True)])
    text.append(second, torch.tensor([len(row) for row in rows]) - first)
    order = data.draw(st.permutations(range(len(rows))), label="order")
    text.select(order)
    tokens, counts = PromptLookup(longest=longest, shortest=shortest).look_up(text, num_drafts)
    for b, row in enumerate(order):
        expected = found_by_hand(rows[row], num_drafts, longest, shortest)
        assert tokens[b, : counts[b]].tolist() == expected


def test_a_text_that_goes_round_is_looked_up_after_its_first_round() -> None:
    model = clock(1)
    decoder = SpeculativeDecoder(drafter=PromptLookup(num_drafts=4))
    rounds = list(decoder.stream(model, [[0]], max_new_tokens=40))
    drafted = [done.drafted[0] for done in rounds]
    assert drafted[:11] == [0] * 11  # nothing stood there before
    assert drafted[11:-1] == [4] * len(drafted[11:-1])
    assert all(done.accepted == done.drafted for done in rounds)


def test_lookup_needs_no_heads_that_draft() -> None:
    model = make_model("gru", "parallel", 1).eval()
    decoder = SpeculativeDecoder(drafter=PromptLookup(longest=2))
    plain = AutoregressiveDecoder().generate(model, [[1, 2, 1, 2], [3]], max_new_tokens=20)
    assert decoder.generate(model, [[1, 2, 1, 2], [3]], max_new_tokens=20).tokens == plain.tokens


def test_heads_rest_where_the_text_drafts() -> None:
    """And as many tokens as are asked for come from the text; where none do, as many as are asked of the heads."""
    model, rounds_of_heads = clock(4), []
    draft = model.heads.draft
    model.heads.draft = lambda *given, **options: rounds_of_heads.append(options) or draft(*given, **options)
    decoder = SpeculativeDecoder(drafter=LookupOrHeads(num_drafts=2, longest=2, shortest=1, num_lookup=7))
    rounds = list(decoder.stream(model, [[0]], max_new_tokens=60))
    drafted = [done.drafted[0] for done in rounds]
    assert drafted[0] == 0
    assert drafted[1] == 2
    first = drafted.index(7)
    assert drafted[first:-1] == [7] * len(drafted[first:-1])
    assert len(rounds_of_heads) == first - 1
    assert all(options["num_drafts"] == 2 for options in rounds_of_heads)
    both = decoder.generate(model, [[0], [1, 3, 1]], max_new_tokens=60)
    assert both.tokens == AutoregressiveDecoder().generate(model, [[0], [1, 3, 1]], max_new_tokens=60).tokens
