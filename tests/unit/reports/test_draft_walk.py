"""Rounds along a text: those of the decoder where the text is its own, and what a fresh reading says elsewhere."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mtp_modules import MTPModel, SpeculativeDecoder
from mtp_modules.reports import draft_along
from mtp_modules.reports.diagnosis import depths_of
from tests.drafting import ScriptedHeads, copying_script
from tests.helpers import VOCAB, assert_same, extend, make_model, random_tokens

MODELS = [("transformer", "linear"), ("transformer_previous", "parallel"), ("gru", "recurrent"), ("lstm", "linear")]


class Forced:
    """Choose given tokens."""

    done = False

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)

    def __call__(self, logits: Tensor, confidence: Tensor | None = None) -> tuple[Tensor, None]:
        return torch.full((len(logits),), self.tokens.pop(0)), None


def scripted(prompts: list[list[int]], length: int) -> MTPModel:
    """Return a model whose heads draft its own continuation, wrong here and there."""
    model = make_model("transformer", "linear", 5)
    outputs = SpeculativeDecoder().generate(model, prompts, max_new_tokens=length + 8).tokens
    script = copying_script(prompts, outputs, lambda _, place: place % 7 in (2, 3))
    model.heads = ScriptedHeads(heads=model.heads, script=script)
    return model


@pytest.mark.parametrize("kind", ["scripted", *MODELS], ids=str)
def test_on_its_own_text_the_walk_accepts_what_the_decoder_accepts(kind: object) -> None:
    prompt = [3, 1, 4]
    model = scripted([prompt], 30) if kind == "scripted" else make_model(*kind, 5)  # type: ignore[misc]
    rounds = list(
        SpeculativeDecoder(num_drafts=4).stream(model, [prompt], max_new_tokens=31 if kind == "scripted" else 18)
    )
    text = prompt + [token for done in rounds for token in done.tokens[0]]
    ends = torch.tensor([len(done.tokens[0]) for done in rounds]).cumsum(0) + len(prompt) - 1
    found = draft_along(model, torch.tensor([text[:-4]]), num_drafts=4)
    by_place = dict(zip(found.positions.tolist(), found.accepted.tolist(), strict=True))
    compared = [
        (by_place[int(end)], done.accepted[0])
        for end, done in zip(ends, rounds[1:], strict=False)
        if done.drafted == [4] and int(end) in by_place
    ]
    assert len(compared) > 2
    assert all(mine == theirs for mine, theirs in compared)
    if kind == "scripted":
        assert len({mine for mine, _ in compared}) > 2


@pytest.mark.parametrize(("trunk", "heads"), MODELS)
def test_choices_and_probabilities_are_those_of_a_fresh_reading(trunk: str, heads: str) -> None:
    model, text = make_model(trunk, heads, 4, seed=3), random_tokens(2, 9)
    found = draft_along(model, text, num_drafts=3)
    assert found.positions.tolist() == sorted([*range(1, 9)] * 2)
    for index, (row, place) in enumerate(zip(found.rows.tolist(), found.positions.tolist(), strict=True)):
        drafts, read = found.drafts[index].tolist(), text[row, : place + 1].tolist()
        assert found.confidence[index, 0].item() == pytest.approx(draft_probs(model, read, drafts)[0][drafts[0]].item())
        for depth in range(3):
            probs = model_probs(model, read + drafts[:depth])
            assert found.target_tokens[index, depth] == probs.argmax()
        held = [token == draft for token, draft in zip(found.target_tokens[index].tolist(), drafts, strict=True)]
        assert found.accepted[index] == [*held, False].index(False)


@torch.no_grad()
def model_probs(model: MTPModel, text: list[int]) -> Tensor:
    states = model(torch.tensor([text + [0] * model.lookahead]))[0]
    return model.unembedding.logits(states[0, -1]).softmax(dim=-1)


@torch.inference_mode()
def draft_probs(model: MTPModel, text: list[int], forced: list[int]) -> Tensor:
    """Return the draft distributions after a text whose last token is emitted but not read, with given drafts."""
    state, own = model.trunk.new_state(1, 40), model.heads.new_state(1, 40)
    extend(model, torch.tensor([text[:-1]]), state, own)
    own.commit([len(text) - 1])
    draft = model.heads.draft(
        torch.tensor(text[-1:]),
        own,
        num_drafts=len(forced),
        embed=model.trunk.embedding,
        unembed=model.unembedding.logits,
        sampler=Forced(forced),
    )
    return draft.logits[0].softmax(dim=-1)


@pytest.mark.parametrize(("trunk", "heads"), [("transformer", "linear"), ("gru", "recurrent"), ("gru", "sequential")])
def test_the_chance_to_reach_a_depth_is_that_of_all_chains_enumerated(trunk: str, heads: str) -> None:
    model, text = make_model(trunk, heads, 3), [4, 2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)  # distributions that are neither flat nor sharp
    first_q, first_p = draft_probs(model, text, [0])[0], model_probs(model, text)
    first = torch.minimum(first_q, first_p)
    second = torch.stack(
        [
            torch.minimum(draft_probs(model, text, [token, 0])[1], model_probs(model, [*text, token])).sum()
            for token in range(VOCAB)
        ]
    )
    exact = torch.stack((first.sum(), first @ second))
    copies = 4000
    found = draft_along(model, torch.tensor([text] * copies), num_drafts=2, seed=1)
    reach, distance = found.reach, 0.5 * (first_q - first_p).abs().sum()
    assert_same(reach[:, 0], exact[0].expand(copies))  # nothing is sampled for the first depth
    assert_same(found.overlap[:, 0], (1 - distance).expand(copies))
    assert found.before[:, 0].eq(1).all()
    error = reach[:, 1].std() / copies**0.5
    assert error > 1e-4
    assert abs(reach[:, 1].mean() - exact[1]) < 5 * error
    # Of the chains that reach the second depth, rejection sampling keeps first @ second / first of the drafts there.
    conditional = (exact[1] / exact[0]).item()
    residual = reach[:, 1] - conditional * found.before[:, 1]
    assert abs(depths_of(found)[1].overlap - conditional) < 5 * (residual.std() / copies**0.5 / exact[0]).item()
    assert abs(conditional - found.overlap[:, 1].mean()) > 1e-4  # not the plain mean: likelier chains count more


def test_every_so_many_tokens_are_some_of_all() -> None:
    model, text = make_model("transformer", "recurrent", 4), random_tokens(3, 14)
    every, some = (draft_along(model, text, num_drafts=3, every=step) for step in (1, 4))
    assert some.positions.unique().tolist() == [1, 5, 9, 13]
    kept = torch.isin(every.positions, some.positions)
    for name in ("rows", "positions", "drafts", "target_tokens", "accepted"):
        assert torch.equal(getattr(every, name)[kept], getattr(some, name))
    assert_same(every.confidence[kept], some.confidence)


def test_a_row_counts_up_to_its_first_boundary() -> None:
    model, text = make_model("transformer", "linear", 3), random_tokens(2, 10)
    documents = torch.tensor([[0] * 10, [0] * 4 + [1] * 6])
    found = draft_along(model, text, num_drafts=2, document_ids=documents)
    assert found.positions[found.rows == 0].tolist() == list(range(1, 10))
    assert found.positions[found.rows == 1].tolist() == [1, 2, 3]


def test_rounds_stay_within_the_positions_of_the_trunk() -> None:
    model = make_model("transformer", "linear", 4)  # reads 48
    found = draft_along(model, random_tokens(1, 60), num_drafts=3)
    assert found.positions.max() == 48 - 3 - 1
    assert all(later == earlier + 1 for earlier, later in pairwise(found.positions.tolist()))


def test_what_the_walk_refuses() -> None:
    model = make_model("transformer", "linear", 4)
    with pytest.raises(ValueError, match="draft_along: every must be at least 1, got 0"):
        draft_along(model, random_tokens(1, 9), num_drafts=2, every=0)
    with pytest.raises(ValueError, match=r"num_drafts must lie in 1\.\.3 for 4 horizons, got 4"):
        draft_along(model, random_tokens(1, 9), num_drafts=4)
    with pytest.raises(ValueError, match="a text of 1 tokens leaves no room for 2 drafts within max_positions=48"):
        draft_along(model, random_tokens(1, 1), num_drafts=2)
    with pytest.raises(ValueError, match="token 11 is outside the vocabulary"):
        draft_along(model, torch.tensor([[1, VOCAB]]), num_drafts=2)
