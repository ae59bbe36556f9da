"""A loss, gradient or weight that is not finite: nothing is updated, and nothing is saved."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from mtp_modules.training import MTPModule
from mtp_modules.training.optimizers import MuonWithAdamW
from tests.helpers import assert_same
from tests.unit.training.running import data, module, trainer


def model(**kwargs: Any) -> MTPModule:
    given = module()
    torch.manual_seed(0)
    arguments = {
        "optimizer": partial(torch.optim.AdamW, lr=0.02),
        "trunk": given.model.trunk,
        "heads": given.model.heads,
    }
    return MTPModule(loss=given.loss, **arguments | kwargs)


class Spoil(Callback):
    """Makes the loss or a gradient of some batches not finite; keeps the weights before each step."""

    def __init__(self, batches: set[int], value: float, *, gradient: bool) -> None:
        self.batches, self.value, self.gradient = batches, value, gradient
        self.weights: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: MTPModule, batch: Any, batch_idx: int) -> None:
        self.now = trainer.fit_loop.total_batch_idx
        self.weights[self.now] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        pl_module.loss.register_forward_hook(self._spoil) if self.now == 0 and not self.gradient else None

    def _spoil(self, loss: Any, given: Any, terms: Any) -> Any:
        return replace(terms, loss=terms.loss * self.value) if self.now in self.batches else None

    def on_after_backward(self, trainer: Any, pl_module: MTPModule) -> None:
        if self.gradient and self.now in self.batches:
            pl_module.model.trunk.embedding.weight.grad[3, 2] = self.value


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_the_run_stops_before_the_update(tmp_path: Path, value: float, gradient: bool) -> None:
    spoil, trained = Spoil({4}, value, gradient=gradient), model()
    what = "the gradient of model.trunk.embedding.weight is not finite" if gradient else rf"the loss is {value:.3g}"
    sentence = (
        rf"^fit: {what} at step 5 \(batch 4 of epoch 0\); the weights are those before it\. Look at that batch, lower "
        r"the learning rate \(now 0\.02\) or set trainer\.gradient_clip_val, or let model\.skip_non_finite pass over "
        r"such steps\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, spoil).fit(trained, data())
    assert_same(trained.state_dict(), spoil.weights[4], tolerance=0)


@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.AdamW, lr=0.02, weight_decay=0.5), partial(MuonWithAdamW, lr=0.02, adamw_lr=0.02)],
    ids=["AdamW", "Muon"],
)
def test_skipped_steps_change_nothing_and_are_counted(tmp_path: Path, optimizer: Any) -> None:
    spoil = Spoil({2, 3, 7}, float("nan"), gradient=True)
    trained = model(skip_non_finite=2, optimizer=optimizer)
    run = trainer(tmp_path, spoil, gradient_clip_val=1.0)
    run.fit(trained, data())
    for batch in range(11):
        same = all(torch.equal(value, spoil.weights[batch + 1][name]) for name, value in spoil.weights[batch].items())
        assert same == (batch in spoil.batches)
    assert float(run.callback_metrics["train/skipped_steps"]) == 3
    assert all(value.isfinite().all() for value in trained.state_dict().values())


def test_more_in_a_row_than_allowed_stop_the_run(tmp_path: Path) -> None:
    trained = model(skip_non_finite=2)
    with pytest.raises(ValueError, match=r"at step 6 \(batch 5 of epoch 0\), as in the 2 steps before; the weights"):
        trainer(tmp_path, Spoil({0, 1, 3, 4, 5}, float("inf"), gradient=True)).fit(trained, data())
    with pytest.raises(ValueError, match=re.escape("MTPModule: skip_non_finite must be at least 0, got -1.")):
        model(skip_non_finite=-1)


def test_one_batch_of_several_is_found(tmp_path: Path) -> None:
    trained, spoil = model(), Spoil({4}, float("nan"), gradient=False)
    with pytest.raises(ValueError, match=r"the loss is nan at step 2 \(batch 5 of epoch 0\)"):
        trainer(tmp_path, spoil, accumulate_grad_batches=3).fit(trained, data())
    assert_same(trained.state_dict(), spoil.weights[4], tolerance=0)


def test_no_checkpoint_of_such_weights_replaces_a_good_one(tmp_path: Path) -> None:
    class Overflow(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: MTPModule, *_: Any) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    pl_module.model.trunk.embedding.weight[0, 0] = float("inf")

    saver = ModelCheckpoint(dirpath=tmp_path, monitor="val/loss/head_1", filename="best", save_last=True)
    run = trainer(tmp_path, Overflow(), saver, enable_checkpointing=True, val_check_interval=3)
    with pytest.raises(
        ValueError, match=r"^saving: model\.trunk\.embedding\.weight is not finite after step 6, so nothing"
    ):
        run.fit(model(), data())
    for name in ("best.ckpt", "last.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["global_step"] == 3
        assert all(value.isfinite().all() for value in saved["state_dict"].values())
