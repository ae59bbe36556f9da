"""Decoding sees what training sees: after any commits, states and drafts equal those of a fresh pass over the text."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_modules import MTPModel, Trunk
from mtp_modules.core import DecodingState, TrunkOutput
from mtp_modules.core.targets import horizon_of_draft
from mtp_modules.layers.last_hidden import LastHiddenState
from tests.helpers import (
    TRUNKS,
    TRUNKS_WITH_EVERY_HEADS,
    TRUNKS_WITH_HEADS,
    TRUNKS_WITH_LEAPS,
    VOCAB,
    assert_same,
    extend,
    extend_heads,
    log_probs_of,
    make_model,
    make_trunk,
    random_tokens,
)

CAPACITY = 40


def fresh(trunk: Trunk, kept: list[int], chunk: Tensor) -> list[Tensor]:
    """Read a row and its chunk in one forward pass without a state; return the chunk's hidden states, all layers'."""
    tokens = torch.cat((torch.tensor(kept, dtype=torch.long), chunk))
    output = trunk(tokens[None])
    return [states[0, len(kept) :] for states in (output.hidden, *output.features)]


def check_chunk(trunk: Trunk, state: DecodingState, kept: list[list[int]], chunk: Tensor) -> TrunkOutput:
    """Append a chunk and compare every row with a fresh forward pass."""
    output = trunk(chunk, state=state)
    assert len(output.features) == len(trunk.feature_layers) > 0
    for b, row in enumerate(kept):
        assert_same([states[b] for states in (output.hidden, *output.features)], fresh(trunk, row, chunk[b]))
    return output


def keep_tokens(kept: list[list[int]], chunk: Tensor, keep: list[int]) -> None:
    for row, tokens, count in zip(kept, chunk.tolist(), keep, strict=True):
        row.extend(tokens[:count])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_keep_of_two_rows_equals_a_fresh_prefill(trunk: str) -> None:
    model = make_trunk(trunk)
    prompt, chunk, after = random_tokens(2, 2), random_tokens(2, 3, seed=1), random_tokens(2, 2, seed=2)
    for keep in itertools.product(range(4), repeat=2):
        state, kept = model.new_state(2, CAPACITY), [[], []]
        for tokens, count in ((prompt, [2, 2]), (chunk, list(keep))):
            check_chunk(model, state, kept, tokens)
            state.commit(count)
            keep_tokens(kept, tokens, count)
        assert state.lengths == [2 + count for count in keep]
        check_chunk(model, state, kept, after)


def check_drafts(model: MTPModel, state: DecodingState, kept: list[list[int]], token: Tensor) -> None:
    """Compare drafted logits with what training computes for the same tokens."""
    if len(model.horizons) == 1:
        return
    embed, unembed = model.trunk.embedding, model.unembedding.logits
    for num_drafts in range(1, max(model.horizons)):
        draft = model.heads.draft(token, state, num_drafts=num_drafts, embed=embed, unembed=unembed)
        assert draft.tokens.tolist() == draft.logits.argmax(dim=-1).tolist()
    for b, row in enumerate(kept):
        all_probs = log_probs_of(model, torch.tensor([[*row, int(token[b]), *draft.tokens[b].tolist()]]))
        for depth in range(num_drafts):
            index, back = horizon_of_draft(model.horizons, depth)
            if back < len(row):
                assert_same(draft.logits[b, depth].log_softmax(dim=0), all_probs[index][0, len(row) - 1 - back])


def check_round(
    model: MTPModel, states: list[DecodingState], kept: list[list[int]], chunk: Tensor, keep: list[int]
) -> None:
    """Read a chunk, and see that horizon 1 says what training would; then keep some of it."""
    first = extend_heads(model, check_chunk(model.trunk, states[0], kept, chunk), chunk, states[1])
    for b, row in enumerate(kept):
        whole = torch.cat((torch.tensor(row, dtype=torch.long), chunk[b], chunk.new_zeros(model.lookahead)))
        assert_same(first[b], model(whole[None])[0][0, len(row) :])
    for state in states:
        state.commit(keep)
    keep_tokens(kept, chunk, keep)
    assert states[0].lengths == states[1].lengths == [len(row) for row in kept]


@pytest.mark.parametrize(("trunk", "heads"), [*TRUNKS_WITH_EVERY_HEADS, *TRUNKS_WITH_LEAPS])
def test_rows_of_unequal_length_go_on_token_by_token(trunk: str, heads: str) -> None:
    model = make_model(trunk, heads, 3).eval()
    states = [part.new_state(3, CAPACITY) for part in (model.trunk, model.heads)]
    kept: list[list[int]] = [[], [], []]
    for seed, keep in enumerate(([1, 4, 2], [1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 2, 1], [1, 1, 1])):
        check_round(model, states, kept, random_tokens(3, max(keep), seed=seed), keep)
        check_drafts(model, states[1], kept, random_tokens(3, 1, seed=seed)[:, 0])


@pytest.mark.parametrize(("trunk", "heads"), [*TRUNKS_WITH_EVERY_HEADS, *TRUNKS_WITH_LEAPS])
@settings(max_examples=settings.default.max_examples // 4)
@given(data=st.data())
def test_repeated_rounds_equal_training(trunk: str, heads: str, data: st.DataObject) -> None:
    own = data.draw(st.booleans(), label="own")
    model = make_model(trunk, heads, data.draw(st.integers(1, 4), label="num_horizons"), own=own, bias=own).eval()
    rows = data.draw(st.integers(1, 3), label="rows")
    states = [part.new_state(rows, CAPACITY) for part in (model.trunk, model.heads)]
    kept: list[list[int]] = [[] for _ in range(rows)]
    for round_ in range(data.draw(st.integers(1, 4), label="rounds")):
        length = data.draw(st.integers(1, 4), label="chunk")
        chunk = random_tokens(rows, length, seed=data.draw(st.integers(0, 99), label="seed"))
        counts = st.integers(0 if round_ else 1, length)
        check_round(model, states, kept, chunk, data.draw(st.lists(counts, min_size=rows, max_size=rows), label="keep"))
        if data.draw(st.booleans(), label="drop"):
            order = data.draw(st.permutations(range(rows)), label="order")[: max(1, rows - 1)]
            for state in states:
                state.select(order)
            kept, rows = [kept[b] for b in order], len(order)
        check_drafts(model, states[1], kept, torch.randint(VOCAB, (rows,)))


@given(data=st.data(), rows=st.integers(1, 3), count=st.integers(0, 3))
def test_the_last_hidden_states_are_those_of_each_row_s_last_tokens(data: st.DataObject, rows: int, count: int) -> None:
    state = LastHiddenState(rows, CAPACITY, count=count)
    kept = [[torch.zeros(2)] * count for _ in range(rows)]
    for _ in range(data.draw(st.integers(1, 4), label="rounds")):
        length = data.draw(st.integers(1, 4), label="chunk")
        hidden = torch.randn(rows, length, 2)
        state.begin(length)
        state.append(hidden)
        keep = data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows), label="keep")
        state.commit(keep)
        for row, own in enumerate(kept):
            own += hidden[row, : keep[row]]
            for back in range(count):
                assert_same(state.back(back)[row], own[-1 - back])


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
def test_a_state_without_drafts_gives_the_same_horizon_1(trunk: str, heads: str) -> None:
    model = make_model(trunk, heads, 3).eval()
    tokens = random_tokens(2, 5)
    output = model.trunk(tokens)
    states = [model.heads.new_state(2, CAPACITY, for_drafts=for_drafts) for for_drafts in (True, False)]
    first = [extend_heads(model, output, tokens, state) for state in states]
    assert_same(first[0], first[1])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_chunk_must_be_committed_before_the_next(trunk: str) -> None:
    model = make_trunk(trunk)
    state = model.new_state(1, CAPACITY)
    model(random_tokens(1, 2), state=state)
    with pytest.raises(
        ValueError, match=r"State: the last chunk was not committed; call commit\(keep\) before the next"
    ):
        model(random_tokens(1, 2), state=state)
    with pytest.raises(ValueError, match=r"State: the last chunk was not committed; call commit\(keep\) before select"):
        state.select([0])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_state_refuses_to_overflow(trunk: str) -> None:
    model = make_trunk(trunk)
    state = model.new_state(1, 4)
    model(random_tokens(1, 3), state=state)
    state.commit([3])
    with pytest.raises(
        ValueError, match="capacity is 4 tokens per row, a chunk of 2 after 3 needs 5; ask new_state for more"
    ):
        model(random_tokens(1, 2), state=state)
    model(random_tokens(1, 1), state=state)


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
def test_a_chunk_may_reach_beyond_the_last_position_but_not_stay_there(trunk: str, heads: str) -> None:
    model, tokens = make_model(trunk, heads, 3).eval(), random_tokens(2, 9)
    model.trunk.max_positions = model.heads.max_positions = 6

    def read(rows: Tensor, *, keep: list[int], states: list[DecodingState]) -> Tensor:
        output, embed = model.trunk(rows, state=states[0]), model.trunk.embedding
        given = model.heads.features_of(output)
        first = model.heads.extend(output.hidden, states[1], tokens=rows, embed=embed, **given)
        for state in states:
            state.commit(keep)
        return first

    def new() -> list[DecodingState]:
        return [model.trunk.new_state(2, 12), model.heads.new_state(2, 12)]

    states, near_the_end = new(), new()
    read(tokens[:, :5], keep=[5, 2], states=states)
    read(tokens[:, :5], keep=[5, 2], states=near_the_end)
    within, beyond = (
        read(tokens[:, 5:6], keep=[1, 1], states=states),
        read(tokens[:, 5:], keep=[1, 1], states=near_the_end),
    )
    assert_same(beyond[:, :1], within)
    sentence = r"State: a row of 7 tokens is longer than max_positions=6; keep fewer tokens, or build trunk and heads"
    with pytest.raises(ValueError, match=sentence):
        model.trunk(tokens[:, :1], state=near_the_end[0])
    long = new()[0]
    model.trunk(tokens[:, :7], state=long)
    with pytest.raises(ValueError, match=sentence):
        long.commit([7, 2])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_there_must_be_a_chunk_to_commit(trunk: str) -> None:
    with pytest.raises(
        ValueError, match="State: there is no chunk to commit; run a forward pass with this state first"
    ):
        make_trunk(trunk).new_state(1, 4).commit([0])


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("keep", [[1], [1, 3], [-1, 2], [1, 1, 1]], ids=str)
def test_keep_must_fit_the_chunk(trunk: str, keep: list[int]) -> None:
    model = make_trunk(trunk)
    state = model.new_state(2, CAPACITY)
    model(random_tokens(2, 2), state=state)
    with pytest.raises(ValueError, match=r"State: keep must hold 2 numbers from 0 to 2, got \["):
        state.commit(keep)
    state.commit([2, 0])
    assert state.lengths == [2, 0]


def test_heads_cannot_draft_before_a_prompt() -> None:
    model = make_model("gru", "recurrent", 2)
    with pytest.raises(ValueError, match="LastHiddenState: nothing was committed yet; read a prompt first"):
        check_drafts(model, model.heads.new_state(1, 4), [[]], torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("trunk", "heads"), [pair for pair in TRUNKS_WITH_EVERY_HEADS if str(pair.values[0]).startswith("transformer")]
)
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_a_tree_is_read_as_each_of_its_paths_would_be(trunk: str, heads: str, data: st.DataObject) -> None:
    """Every token of a tree sees its own path only, and after a commit the path is all that was read."""
    model = make_model(trunk, heads, 3).eval()
    rows, size = data.draw(st.integers(1, 3), label="rows"), data.draw(st.integers(1, 7), label="size")
    prompt, tokens = random_tokens(rows, 3), random_tokens(rows, size, seed=data.draw(st.integers(0, 99), label="seed"))
    parents = torch.tensor(
        [[-1, *(data.draw(st.integers(0, place - 1)) for place in range(1, size))] for _ in range(rows)]
    )
    state, heads_state = model.trunk.new_state(rows, CAPACITY), model.heads.new_state(rows, CAPACITY)

    def read(chunk: Tensor) -> Tensor:
        return extend(model, chunk, state, heads_state)[1]

    keep = [data.draw(st.integers(1, 3), label="read") for _ in range(rows)]
    read(prompt)
    for part in (state, heads_state):
        part.commit(keep)
    paths: list[list[list[int]]] = []
    for b in range(rows):
        own: list[list[int]] = []
        for place in range(size):
            parent = int(parents[b, place])
            own.append([*(own[parent] if parent >= 0 else []), place])
        paths.append(own)
    depth = max(len(path) for own in paths for path in own) - 1
    for part in (state, heads_state):
        part.expect_tree(parents, depth)
    states = read(tokens)
    kept = []
    for b in range(rows):
        before = prompt[b, : keep[b]].tolist()
        for path in paths[b]:
            text = before + tokens[b, path].tolist()
            expected = model(torch.tensor([text + [0] * model.lookahead]))[0][0, -1]
            assert_same(states[b, path[-1]], expected)
        chosen = paths[b][data.draw(st.integers(0, size - 1), label="end")]
        kept.append((before + tokens[b, chosen].tolist(), chosen))
    longest = max(len(path) for _, path in kept)
    path = torch.tensor([chosen + chosen[-1:] * (longest - len(chosen)) for _, chosen in kept])
    for part in (state, heads_state):
        part.commit([len(chosen) for _, chosen in kept], path)
    after = random_tokens(rows, 2, seed=5)
    states = read(after)
    for b, (text, _) in enumerate(kept):
        whole = [*text, *after[b].tolist()]
        expected = model(torch.tensor([whole + [0] * model.lookahead]))[0][0, -2:]
        assert_same(states[b], expected)
