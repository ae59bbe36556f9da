"""The recurrent trunk against the equations of its cells, and what it refuses."""

import pytest
import torch
from torch import Tensor

from mtp_modules import RecurrentTrunk, TransformerTrunk
from tests.helpers import assert_same, make_trunk, random_tokens


def cell_step(cell: str, layer: torch.nn.Module, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the equations in torch's documentation to one token."""
    given = layer.weight_ih_l0 @ x + layer.bias_ih_l0
    kept = layer.weight_hh_l0 @ hidden + layer.bias_hh_l0
    if cell == "rnn":
        return (given + kept).tanh(), memory
    if cell == "gru":
        (r, z, n), (hr, hz, hn) = given.chunk(3), kept.chunk(3)
        z = (z + hz).sigmoid()
        return (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * hidden, memory
    i, f, g, o = (given + kept).chunk(4)
    memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_trunk_equals_the_equations(cell: str) -> None:
    trunk, tokens = make_trunk(cell), random_tokens(1, 5)
    sequence = list(trunk.embedding.weight[tokens[0]])
    found, features = trunk(tokens)
    for layer, feature in zip(trunk.layers, features, strict=True):
        hidden = memory = torch.zeros(trunk.d_model, dtype=torch.float64)
        for t, x in enumerate(sequence):
            hidden, memory = cell_step(cell, layer, x, hidden, memory)
            sequence[t] = hidden
        assert_same(feature[0], torch.stack(sequence))
    assert_same(found[0], torch.stack(sequence))


def test_the_embedding_may_be_narrower() -> None:
    trunk = RecurrentTrunk(vocab_size=11, d_model=8, embedding_width=3)
    assert trunk.embedding_width == 3
    assert trunk(random_tokens(2, 4)).hidden.shape == (2, 4, 8)


@pytest.mark.parametrize("name", ["vocab_size", "d_model", "num_layers", "embedding_width", "max_positions"])
def test_sizes_must_be_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^RecurrentTrunk: {name} must be at least 1, got 0\.$"):
        RecurrentTrunk(**{"vocab_size": 11, "d_model": 8, name: 0})


def test_the_cell_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"^RecurrentTrunk: cell must be one of rnn, gru, lstm, got 'elman'\.$"):
        RecurrentTrunk(vocab_size=11, d_model=8, cell="elman")


def test_layers_that_are_asked_for_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"^RecurrentTrunk: feature_layers must ascend within 0\.\.0, got \[1\]\.$"):
        RecurrentTrunk(vocab_size=11, d_model=8, feature_layers=[1])


def test_a_sequence_may_not_be_longer_than_max_positions() -> None:
    trunk = RecurrentTrunk(vocab_size=11, d_model=8, max_positions=6)
    trunk(random_tokens(1, 6))
    sentence = "RecurrentTrunk: a sequence of 7 tokens is longer than max_positions=6; shorten it or build the trunk"
    with pytest.raises(ValueError, match=f"^{sentence}"):
        trunk(random_tokens(1, 7))


def test_what_does_not_go_with_a_state() -> None:
    trunk, tokens = RecurrentTrunk(vocab_size=11, d_model=8), random_tokens(1, 3)
    with pytest.raises(ValueError, match=r"^RecurrentTrunk: document_ids cannot be combined with a state;"):
        trunk(tokens, document_ids=tokens, state=trunk.new_state(1, 6))
    other = TransformerTrunk(vocab_size=11, d_model=8, num_layers=1, num_heads=2).new_state(1, 6)
    with pytest.raises(
        ValueError, match=r"^RecurrentTrunk: state must come from this trunk's new_state, got KeyValueState"
    ):
        trunk(tokens, state=other)
