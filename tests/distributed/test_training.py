"""Two processes train as one process does with the double batch."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import ROWS, Run, all_figures, figures, module, train, train_all
from tests.helpers import assert_same

RUNS = [
    Run(strategy="ddp"),
    Run(strategy="ddp", trunk="gru", heads="recurrent", optimizer="adamw", unequal_counts=True, tied=False),
    Run(strategy="ddp", trunk="transformer_previous", heads="linear", activation_checkpointing="full"),
    Run(),
    Run(unequal_counts=True, optimizer="adamw"),
    Run(heads="recurrent", tied=False, unequal_counts=True),
    Run(trunk="transformer_previous", heads="linear", clip=None, accumulate=1),
    Run(trunk="gru", heads="recurrent", optimizer="adamw"),
    Run(trunk="lstm", heads="linear", tied=False, clip=0.001, clip_algorithm="value"),
    Run(activation_checkpointing="full"),
    Run(activation_checkpointing="selective", heads="recurrent"),
    Run(reshard_after_forward=False, tied=False, own_unembeddings=True),
    Run(freeze=("trunk",), heads="recurrent"),
    Run(strategy="ddp", heads="sequential_shared"),
    Run(heads="sequential_shared", activation_checkpointing="full"),
    Run(heads="residual", own_unembeddings=True, tied=False),
    Run(heads="causal", accumulate=1),
    Run(heads="anticausal", activation_checkpointing="full", accumulate=1),
    Run(strategy="ddp", heads="conditioned", optimizer="adamw", accumulate=1),
    Run(heads="conditioned", accumulate=1),
    Run(strategy="ddp", heads="early_exit", trunk="gru", optimizer="adamw", accumulate=1),
    Run(heads="early_exit", accumulate=1),
    Run(heads="eagle", optimizer="adamw", accumulate=1),
    Run(heads="context_transition", activation_checkpointing="full", accumulate=1),
    Run(heads="confident", tied=False),
    Run(strategy="ddp", heads="confident", optimizer="adamw"),
    Run(objectives=True, unequal_counts=True),
    Run(strategy="ddp", objectives=True, unequal_counts=True, optimizer="adamw"),
]
RANDOM = [Run(strategy=strategy, share_of_positions=0.5) for strategy in ("ddp", "fsdp2")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[Run, list[dict[str, Tensor]]]:
    """Return what each run's weights are on both ranks."""
    ranks = run_ranks(train_all, [*RUNS, *RANDOM], tmp_path_factory.mktemp("ranks"), timeout=150)
    return {run: [rank[index] for rank in ranks] for index, run in enumerate([*RUNS, *RANDOM])}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_two_processes_end_at_the_weights_of_one(
    run: Run, trained: dict[Run, list[dict[str, Tensor]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = train(run, 1, tmp_path_factory.mktemp("one"))
    for got in trained[run]:
        assert_same(got, expected)
    frozen = [name for part in run.freeze for name in expected if name.startswith(f"model.{part}.")]
    for name, start in module(run).named_parameters():
        assert torch.equal(start, expected[name]) == (name in frozen), f"{name} must move unless it is frozen"


def test_sampled_positions_are_trained_alike_whole_and_sharded(trained: dict[Run, list[dict[str, Tensor]]]) -> None:
    ddp, fsdp2 = (trained[run] for run in RANDOM)
    assert_same(fsdp2, ddp)


def test_logged_training_figures_do_not_depend_on_how_a_step_is_split(tmp_path: Path) -> None:
    """One batch, two accumulated ones, and two on each of two ranks, with unequally many targets."""
    kept = {"unequal_counts": True, "optimizer": "adamw", "steps": 1, "objectives": True}
    runs = [Run(strategy=strategy, **kept) for strategy in ("ddp", "fsdp2")]
    whole = figures(replace(runs[0], accumulate=1), 1, tmp_path, rows=2 * ROWS)
    names = ("loss", "loss/head_3", "accuracy/head_1", "accepted_length", "token_order/loss", "future_bag/recall")
    assert {f"train/{name}" for name in names} <= whole.keys()
    parts = [figures(runs[0], 1, tmp_path), *itertools.chain(*run_ranks(all_figures, runs, tmp_path))]
    assert len(parts) == 5
    for part in parts:
        assert part == pytest.approx(whole, rel=1e-6)
