"""One run in this process: what it says it used is what it used."""

from typing import Any

import pytest
import torch

from mtp_modules.studies import Run, plan_runs
from mtp_modules.studies.training import calibrate, train
from mtp_modules.training import MTPModule, training_flops
from tests.unit.studies.tiny import study

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
QUIET: dict[str, Any] = {"device": None, "report_step": lambda step: None}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the FLOPs of every batch that is trained on, by the model's own formulas."""
    seen: list[int] = []
    step = MTPModule.training_step

    def counting(self: MTPModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        rows, length = batch["tokens"].shape[0], batch["tokens"].shape[1] - self.lookahead
        share = self.loss.share_of_positions
        seen.append(training_flops(self.model, batch_size=rows, length=length, share_of_positions=share))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MTPModule, "training_step", counting)
    return seen


def runs(**changes: Any) -> tuple[list[Run], dict[str, Any]]:
    asked = study(**changes)
    costs = {cell.label: calibrate(cell, {}, None, **QUIET) for cell in asked.cells()}
    return plan_runs(asked, costs, seeds=1, scale=1.0), costs


def test_matched_flops_are_really_matched(counted: list[int]) -> None:
    arms = {
        "small": {"model.heads.init_args.num_horizons": 1},
        "large": {"model.trunk.init_args.d_model": 40, "trainer.accumulate_grad_batches": 2},
    }
    planned, costs = runs(arms=arms, match="flops", steps=40, points=1, decode=None)
    used = {}
    for run in planned:
        counted.clear()
        result = train(run, costs[run.cell.label], {}, None, **QUIET)
        used[run.cell.arm] = sum(counted)
        assert result["final"]["flops"] == sum(counted)
        assert len(counted) == run.steps * (2 if run.cell.arm == "large" else 1)
    assert planned[0].steps == 40 > planned[1].steps > 0
    assert abs(used["large"] - used["small"]) <= 0.5 * costs["large"].flops


def test_a_run_records_what_it_saw_and_reached(counted: list[int]) -> None:
    (run, _), costs = runs(tests={"longer": {"data.init_args.length": 8}}, points=3)
    counted.clear()
    result = train(run, costs["N = 1"], {}, None, **QUIET)
    assert len(counted) == run.steps == 8
    assert [point["steps"] for point in result["curve"]] == [3, 5, 8]
    last = result["curve"][-1]
    assert (last["examples"], last["tokens"], last["flops"]) == (8 * 8, 8 * 8 * 6, sum(counted))
    assert last["figures"].items() <= result["final"].items()
    assert result["curve"][0]["figures"]["loss/head_1"] > last["figures"]["loss/head_1"]
    assert set(result["tests"]) == {"longer"}
    assert result["tests"]["longer"]["loss/head_1"] != last["figures"]["loss/head_1"]
    assert len(result["positions"]) == 6
    assert {"written/distance_3", "decode/speedup", "parameters"} <= set(result["final"])
    again = train(run, costs["N = 1"], {}, None, **QUIET)
    assert [point["figures"] for point in again["curve"]] == [point["figures"] for point in result["curve"]]


def test_seeds_differ() -> None:
    (run, _), costs = runs(decode=None)
    other = Run(run.cell, 2, run.steps, run.points, None)
    figures = [train(one, costs["N = 1"], {}, None, **QUIET)["final"]["loss/head_1"] for one in (run, other)]
    assert figures[0] != figures[1]


def test_a_run_whose_loss_explodes_is_refused_by_name() -> None:
    optimizer = {"class_path": "SGD", "init_args": {"lr": 1e30}}
    asked = {"arms": {"wild": {"model.optimizer": optimizer, "trainer.gradient_clip_val": None}}, "decode": None}
    (cell,) = study(**asked).cells()
    cost = calibrate(study().cells()[0], {}, None, **QUIET)
    with pytest.raises(ValueError, match=r"wild, seed 1: the loss is not finite after \d steps; use a lower learning"):
        train(Run(cell, 1, 8, 8, None), cost, {}, None, **QUIET)
