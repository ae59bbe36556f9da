"""Two ranks that hold one model together against one process: losses, gradients, trained weights, decoding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tensor as work
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run
from tests.distributed.tensor import Case
from tests.helpers import assert_same

CASES = {
    "tied": Case(),
    "untied": Case(tied=False),
    "documents": Case(documents=True),
    "positions": Case(share_of_positions=0.5),
    "own matrices and biases": Case(own_unembeddings=True, output_bias=True),
    "smoothing and z-loss": Case(label_smoothing=0.1, z_loss=0.01, tied=False),
    "a key-value head a query": Case(trunk="transformer"),
    "previous tokens": Case(trunk="transformer_previous"),
    "linear heads": Case(heads="linear"),
    "recurrent heads": Case(heads="recurrent", tied=False),
    "recurrent trunk": Case(trunk="gru", heads="recurrent"),
}


@pytest.fixture(scope="module")
def scores() -> list[list[dict[str, Any]]]:
    """Score all cases on two ranks."""
    return run_ranks(work.score_shared, list(CASES.values()))


@pytest.mark.parametrize("name", CASES)
def test_a_shared_model_has_the_losses_and_gradients_of_the_whole_one(
    scores: list[list[dict[str, Any]]], name: str
) -> None:
    index, wanted = list(CASES).index(name), work.score(CASES[name])
    for rank in scores:
        assert_same(rank[index], wanted)


def test_each_rank_holds_its_share() -> None:
    first, second = run_ranks(work.shares, Case(tied=False, output_bias=True))
    assert first["unembedding.weight"] == (6, 8)
    assert second["unembedding.weight"] == (5, 8)
    assert second["unembedding.bias"] == (5,)
    assert first["trunk.embedding.weight"] == (6, 8)
    assert first["trunk.layers.0.attention.qkv.weight"] == (8, 8)
    assert first["trunk.layers.0.attention.out.weight"] == (8, 4)
    assert first["heads.layers.2.ffn.gate_up.weight"] == (12, 8)
    assert second["heads.layers.2.ffn.down.weight"] == (8, 6)


def test_a_shared_model_decodes_as_the_whole_one_does() -> None:
    wanted = work.decode(work.model(Case()))
    for found in run_ranks(work.decode_shared, Case()):
        assert found[0] == wanted[0]
        assert_same(found[1], wanted[1])


RUNS = {
    "AdamW": (Run(optimizer="adamw"), Case()),
    "Muon": (Run(), Case(tied=False)),
    "random positions": (Run(optimizer="adamw", share_of_positions=0.5), Case()),
    "clipping by value, recomputing": (
        Run(optimizer="adamw", clip=0.01, clip_algorithm="value", activation_checkpointing="selective"),
        Case(heads="recurrent"),
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, torch.Tensor]]]:
    """Train all runs on two ranks."""
    return run_ranks(work.train_all, list(RUNS.values()), 1, 2, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", RUNS)
def test_a_shared_model_trains_as_the_whole_one_does(
    trained: list[list[dict[str, torch.Tensor]]], name: str, tmp_path: Path
) -> None:
    run, case = RUNS[name]
    wanted = work.train(run, case, 1, 1, tmp_path)
    before = dict(work.module(run, case).named_parameters())
    assert all(not value.equal(before[key]) for key, value in wanted.items())
    for rank in trained:
        assert_same(rank[list(RUNS).index(name)], wanted)
