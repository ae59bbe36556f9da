"""What two processes find on held-out rows, how one of them stops both, and the metric on its own."""

import signal
from pathlib import Path

import pytest
import torch

from mtp_modules.loading import load_model
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run, count_rows, data, evaluate, metric_of, module, stop_one_rank, trainer


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_find_and_predict_what_one_does(tmp_path: Path, strategy: str) -> None:
    evaluator, made, rows = trainer(Run(), 1, tmp_path, limit_val_batches=1.0), module(Run()), data(Run(), 1)
    (figures,) = evaluator.validate(made, rows, verbose=False)
    expected = {
        name: torch.cat([batch[name] for batch in evaluator.predict(made, rows)]) for name in ("tokens", "predicted")
    }
    for rank, ((found,), predicted) in enumerate(run_ranks(evaluate, strategy, tmp_path)):
        assert found == pytest.approx(figures, rel=1e-6)
        for name, values in expected.items():
            assert torch.equal(torch.cat([batch[name] for batch in predicted]), values[rank::2])


def test_the_metric_adds_up_over_ranks() -> None:
    expected = metric_of(range(12))
    for found in run_ranks(count_rows):
        assert found == pytest.approx(expected)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path: Path) -> None:
    for found in run_ranks(stop_one_rank, tmp_path):
        assert found == {strategy: (2, signal.SIGTERM) for strategy in ("ddp", "fsdp2")}
    for strategy in ("ddp", "fsdp2"):
        assert len(load_model(tmp_path / f"{strategy}.ckpt")[0].horizons) == 3
