"""Decoding with an output matrix for each horizon."""

import pytest
import torch

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from tests.drafting import clock
from tests.helpers import EVERY_HEADS, VOCAB, covering, float64, make_model

PROMPTS = [[1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize(("heads", "trunk", "bias"), covering(EVERY_HEADS, ["transformer", "gru"], [True, False]))
def test_speculative_decoding_with_own_matrices_equals_plain_decoding(heads: str, trunk: str, bias: bool) -> None:
    model = make_model(trunk, heads, 4, own=True, bias=bias).eval()
    plain = AutoregressiveDecoder().generate(model, PROMPTS, max_new_tokens=12)
    assert SpeculativeDecoder().generate(model, PROMPTS, max_new_tokens=12).tokens == plain.tokens


def turned_clock(turns: list[int]) -> MTPModel:
    """Build a model that counts up, whose heads all say the same and whose matrix ``k`` adds ``turns[k]`` to it."""
    model = clock(1 + len(turns), hands=[1] * (1 + len(turns)))
    with float64():
        again = MTPModel(trunk=model.trunk, heads=model.heads, own_unembeddings=True).eval()
    with torch.no_grad():
        for weight, turn in zip(again.unembedding.own_weights, turns, strict=True):
            weight.copy_(model.unembedding.weight.roll(turn, dims=0))
    return again


@pytest.mark.parametrize(
    ("turns", "accepted"), [([1, 2, 3], [1, 1, 1]), ([1, 3, 2], [1, 0, 0]), ([0, 2, 3], [0, 0, 0])]
)
def test_each_draft_comes_from_its_own_matrix(turns: list[int], accepted: list[float]) -> None:
    generation = SpeculativeDecoder().generate(turned_clock(turns), [[0], [7]], max_new_tokens=13)
    assert [row[:4] for row in generation.tokens] == [[1, 2, 3, 4], [8, 9, 10, 0]]
    assert VOCAB == 11
    assert generation.stats.acceptance == accepted
