"""Shared sequential heads draft beyond their horizons, and no draft leaves anything behind."""

import pytest
import torch
from torch import Tensor

from mtp_modules import AutoregressiveDecoder, MTPModel, SequentialHeads, SpeculativeDecoder
from mtp_modules.core import DecodingState
from tests.helpers import MAX_POSITIONS, VOCAB, assert_same, extend, make_model, random_tokens


def states_after(model: MTPModel, text: list[int]) -> tuple[DecodingState, DecodingState]:
    """Return states that have read a text."""
    states = model.trunk.new_state(1, 40), model.heads.new_state(1, 40)
    extend(model, torch.tensor([text]), *states)
    for state in states:
        state.commit([len(text)])
    return states


def logits_of_drafts(model: MTPModel, state: DecodingState, token: int, num_drafts: int) -> tuple[Tensor, list[int]]:
    embed, unembed = model.trunk.embedding, model.unembedding.logits
    draft = model.heads.draft(torch.tensor([token]), state, num_drafts=num_drafts, embed=embed, unembed=unembed)
    return draft.logits[0], draft.tokens[0].tolist()


@torch.inference_mode()
def naive_logits(model: MTPModel, text: list[int], following: list[int]) -> list[Tensor]:
    """Let the last module go on with what it said itself, reading the whole sequence anew for every draft."""
    heads = model.heads
    assert isinstance(heads, SequentialHeads)
    last = heads.num_horizons - 1
    embedded = model.trunk.embedding(torch.tensor([[*text, *following]]))
    inputs, found = model.trunk(torch.tensor([text])).hidden, []
    for depth in range(len(following)):
        ahead = min(depth + 1, last)
        read = heads.steps[0](
            inputs, embedded[:, ahead : ahead + inputs.shape[1]], heads.rotary(None, inputs.shape[1], inputs)
        )
        state = heads.norms[0](read)
        found.append(model.unembedding.logits(state[0, -1]))
        inputs = state if depth + 1 < last else torch.cat((inputs, state[:, -1:]), dim=1)
    return found


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("num_horizons", [2, 3, 4])
def test_drafts_beyond_the_horizons_repeat_the_last_module(num_horizons: int, length: int) -> None:
    model = make_model("transformer", "sequential_shared", num_horizons).eval()
    text = random_tokens(1, length)[0].tolist()
    logits, drafts = logits_of_drafts(model, states_after(model, text)[1], 3, num_horizons + 3)
    for found, expected in zip(logits, naive_logits(model, text, [3, *drafts[:-1]]), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("heads", ["sequential", "sequential_shared"])
def test_drafts_leave_nothing_behind(heads: str) -> None:
    """After other tokens than those drafted are read, drafts are those of a state that never drafted."""
    model = make_model("transformer", heads, 4).eval()
    text, after = random_tokens(1, 5)[0].tolist(), random_tokens(1, 3, seed=1)
    states = states_after(model, text)
    _, drafts = logits_of_drafts(model, states[1], int(after[0, 0]), 3)
    assert drafts[:2] != after[0, 1:].tolist()
    extend(model, after, *states)
    for state in states:
        state.commit([3])
    found, _ = logits_of_drafts(model, states[1], 7, 3)
    expected, _ = logits_of_drafts(model, states_after(model, [*text, *after[0].tolist()])[1], 7, 3)
    assert_same(found, expected)


def test_decoding_with_drafts_beyond_the_horizons_up_to_the_end_of_the_context() -> None:
    model = make_model("transformer", "sequential_shared", 3).eval()
    prompts = [[1, 2, 3], [VOCAB - 1]]
    asked = {"max_new_tokens": 2 * MAX_POSITIONS}
    plain = AutoregressiveDecoder().generate(model, prompts, **asked)
    assert plain.finish_reasons == ["context", "context"]
    for num_drafts in (2, 3, 7):
        assert SpeculativeDecoder(num_drafts=num_drafts).generate(model, prompts, **asked).tokens == plain.tokens
