"""Decoders as their users meet them: streams, states, what is refused."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.decoders import Decoder, DecodingStats, Round, StopRule
from tests.drafting import clock, round_of
from tests.helpers import (
    TRUNKS,
    TRUNKS_WITH_EVERY_HEADS,
    assert_same,
    extend,
    lists_of,
    make_model,
    make_trunk,
    random_tokens,
)

DECODERS = [pytest.param(AutoregressiveDecoder(), id="plain"), pytest.param(SpeculativeDecoder(), id="speculative")]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_gives_the_tokens_of_generate(decoder: Decoder) -> None:
    model, prompts = make_model("gru", "recurrent", 4).eval(), [[1], [2, 3], [4, 5, 6]]
    tokens: list[list[int]] = [[], [], []]
    for done in decoder.stream(model, prompts, max_new_tokens=7, stop=StopRule(tokens=(1,))):
        assert isinstance(done, Round)
        for row, new in zip(done.rows, done.tokens, strict=True):
            assert new
            tokens[row] += new
    assert tokens == decoder.generate(model, prompts, max_new_tokens=7, stop=StopRule(tokens=(1,))).tokens


@pytest.mark.parametrize("decoder", DECODERS)
def test_rows_that_finish_leave_the_batch(decoder: Decoder) -> None:
    model, prompts = clock(3), [[0], [5], [8]]
    rounds = list(decoder.stream(model, prompts, max_new_tokens=8, stop=StopRule(tokens=[10])))
    finished = {row: index for index, done in enumerate(rounds) for row in done.rows}
    assert finished[2] < finished[1] < finished[0]
    for index, done in enumerate(rounds):
        assert done.rows == [row for row in range(3) if finished[row] >= index]
        for row, reason in zip(done.rows, done.finish_reasons, strict=True):
            assert (reason is not None) == (finished[row] == index)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_can_be_abandoned(decoder: Decoder) -> None:
    model = make_model("transformer", "parallel", 3).eval()
    whole = decoder.generate(model, [[1, 2]], max_new_tokens=9).tokens[0]
    stream = decoder.stream(model, [[1, 2]], max_new_tokens=9)
    first = next(stream).tokens[0]
    stream.close()
    assert first == whole[: len(first)]
    assert decoder.generate(model, [[1, 2]], max_new_tokens=9).tokens[0] == whole


@pytest.mark.parametrize("decoder", DECODERS)
def test_who_reads_a_stream_can_compute_gradients_between(decoder: Decoder) -> None:
    model = make_model("transformer_previous", "parallel", 3).eval()
    for _ in decoder.stream(model, [[1, 2], [3]], max_new_tokens=5):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        model(random_tokens(1, 6))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.trunk.layers.parameters())


@pytest.mark.parametrize("decoder", DECODERS)
def test_two_streams_of_one_model_do_not_meet(decoder: Decoder) -> None:
    model = make_model("lstm", "linear", 3).eval()
    alone = [list(decoder.stream(model, [[token]], max_new_tokens=6)) for token in (1, 2)]
    streams = [decoder.stream(model, [[token]], max_new_tokens=6) for token in (1, 2)]
    together: list[list[Round]] = [[], []]
    for _ in range(6):
        for stream, rounds in zip(streams, together, strict=True):
            if done := next(stream, None):
                rounds.append(done)
    assert list(map(lists_of, together)) == list(map(lists_of, alone))


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoding_never_changes_the_model(decoder: Decoder) -> None:
    model = make_model("transformer", "recurrent", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder.generate(model, [[1, 2]], max_new_tokens=5)
    assert not any(module.training for module in model.modules())
    assert_same(model.state_dict(), before, tolerance=0)


@pytest.mark.parametrize("tokens", [[[5, 6, 7], [8], []], [[], [], []]], ids=str)
def test_a_round_gives_the_lists_that_it_was_made_of(tokens: list[list[int]]) -> None:
    done = round_of([4, 0, 2], tokens, [2, 0, 0], [3, 3, 3], [None, "stop", "context"])
    assert (done.rows, done.tokens, done.accepted, done.drafted) == ([4, 0, 2], tokens, [2, 0, 0], [3, 3, 3])
    assert done.finish_reasons == [None, "stop", "context"]


def test_stats_of_rounds() -> None:
    stats = DecodingStats()
    stats.count(round_of([0, 1], [[5], [6]], [0, 0], [0, 0], [None, None]))
    stats.count(round_of([0, 1], [[1, 2, 3], [4]], [2, 0], [3, 3], [None, "stop"]))
    stats.count(round_of([0], [[1, 2]], [1], [1], ["length"]))
    assert (stats.tokens, stats.forwards) == (8, 5)
    assert (stats.drafted, stats.accepted) == ([3, 2, 2], [2, 1, 0])
    assert stats.tokens_per_forward == 8 / 5
    assert stats.acceptance == [2 / 3, 1 / 2, 0.0]


class Silent(Decoder):
    """Tells of the first of its prompts only, or of none."""

    def __init__(self, *, tells: bool) -> None:
        self.tells = tells

    def rounds(self, *_: object) -> Iterator[Round]:
        return iter([round_of([0], [[5]], [0], [0], ["length"])] if self.tells else [])


@pytest.mark.parametrize("tells", [True, False])
def test_prompts_that_no_round_is_about_have_no_tokens(tells: bool) -> None:
    generation = Silent(tells=tells).generate(clock(1), [[1], [2]], max_new_tokens=1)
    assert generation.tokens == [[5] if tells else [], []]
    assert generation.finish_reasons == ["length" if tells else "", ""]
    assert generation.stats.forwards == tells


def test_stats_of_nothing() -> None:
    assert DecodingStats().tokens_per_forward == 0.0
    assert DecodingStats(drafted=[0], accepted=[0]).acceptance == [0.0]


def test_generation_takes_time() -> None:
    assert AutoregressiveDecoder().generate(clock(1), [[1]], max_new_tokens=2).stats.seconds > 0


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
@pytest.mark.parametrize(
    "rows", [[0, 1, 2], [2, 0], [1], [2], [2, 1], [0, 2], [2, 2], [2, 1, 0], [2, 1, 0, 1]], ids=str
)
def test_selected_rows_equal_a_batch_of_those_rows(trunk: str, heads: str, rows: list[int]) -> None:
    model = make_model(trunk, heads, 3).eval()
    chunk, keep, after = random_tokens(3, 4), [4, 1, 3], random_tokens(3, 2, seed=1)

    def read(chosen: list[int]) -> tuple[Any, Any]:
        states = model.trunk.new_state(len(chosen), 9), model.heads.new_state(len(chosen), 9)
        extend(model, chunk[chosen], *states)
        for state in states:
            state.commit([keep[row] for row in chosen])
        return states

    selected, alone = read([0, 1, 2]), read(rows)
    for state in selected:
        state.select(rows)
    results = []
    for states in (selected, alone):
        assert states[0].lengths == states[1].lengths == [keep[row] for row in rows]
        draft = model.heads.draft(
            after[rows, 0],
            states[1],
            num_drafts=2,
            embed=model.trunk.embedding,
            unembed=model.unembedding.logits,
        )
        results.append((draft.logits, *extend(model, after[rows], *states)))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_selected_states_go_their_own_ways(trunk: str) -> None:
    """What one row reads later does not show in another."""
    model = make_trunk(trunk)
    states = [model.new_state(2, 9), model.new_state(2, 9)]
    for state in states:
        model(random_tokens(2, 3), state=state)
        state.commit([3, 2])
        state.select([1, 0])
    tokens = random_tokens(2, 2, seed=1)
    other = tokens.clone()
    other[0] = (other[0] + 1) % 11
    first, second = (model(read, state=state).hidden for read, state in zip((tokens, other), states, strict=True))
    assert_same(first[1], second[1], tolerance=0)
    assert (first[0] != second[0]).any()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"prompts": []}, "generate: prompts is empty; give at least one."),
    "an empty prompt": ({"prompts": [[1], []]}, "generate: prompt 1 is empty; give at least one token."),
    "a long prompt": (
        {"prompts": [[1], [2] * 129]},
        "generate: prompt 1 has 129 tokens, the trunk reads at most max_positions=128; shorten the prompt.",
    ),
    "a token above the vocabulary": (
        {"prompts": [[1], [2, 11]]},
        "generate: token 11 is outside the vocabulary 0..10; "
        "encode the text with the tokenizer that the model was trained with.",
    ),
    "a negative token": ({"prompts": [[-1]]}, "generate: token -1 is outside the vocabulary 0..10;"),
    "no budget": ({"max_new_tokens": 0}, "generate: max_new_tokens must be at least 1, got 0."),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_any_work(decoder: Decoder, arguments: dict[str, Any], sentence: str) -> None:
    model = clock(3)
    model.trunk.register_forward_pre_hook(lambda *_: pytest.fail("the trunk was run"))
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        decoder.generate(model, **({"prompts": [[1]], "max_new_tokens": 3} | arguments))


def test_one_horizon_cannot_draft() -> None:
    with pytest.raises(
        ValueError,
        match=r"^SpeculativeDecoder: LinearHeads with 1 horizon can draft nothing; use AutoregressiveDecoder, "
        r"PromptLookup, or heads with more horizons\.$",
    ):
        SpeculativeDecoder().generate(clock(1), [[1]], max_new_tokens=3)


def test_more_drafts_than_the_heads_have() -> None:
    with pytest.raises(
        ValueError,
        match=r"^SpeculativeDecoder: num_drafts=3 is more than the 2 that LinearHeads can draft; lower it\.$",
    ):
        SpeculativeDecoder(num_drafts=3).generate(clock(3), [[1]], max_new_tokens=3)


@pytest.mark.parametrize("num_drafts", [0, -1])
def test_fewer_than_one_draft(num_drafts: int) -> None:
    with pytest.raises(ValueError, match=rf"^SpeculativeDecoder: num_drafts must be at least 1, got {num_drafts}\.$"):
        SpeculativeDecoder(num_drafts=num_drafts)
