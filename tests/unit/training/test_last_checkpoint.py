"""``last.ckpt`` is the last step, saved between steps, and a run resumes from it exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mtp_modules import LinearHeads, MultiTokenLoss, RecurrentTrunk
from mtp_modules.loading import load_model
from mtp_modules.training import LastCheckpoint, MTPModule
from tests.helpers import assert_same
from tests.unit.training.running import VOCAB, data, module, trainer


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def best(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    """The callback of the shipped configurations."""
    return ModelCheckpoint(dirpath=folder, monitor="val/loss/head_1", filename="best", save_last=True, **kwargs)


def test_last_is_the_last_step_when_the_metric_got_worse(tmp_path: Path) -> None:
    saver = best(tmp_path, mode="max")  # a falling loss never improves
    run = trainer(tmp_path, saver, enable_checkpointing=True, val_check_interval=2, max_epochs=-1, max_steps=11)
    run.fit(module(), data())
    assert (step_of(tmp_path / "best.ckpt"), step_of(tmp_path / "last.ckpt")) == (2, 11)
    assert run.checkpoint_callback is saver
    assert saver.best_model_path == str(tmp_path / "best.ckpt")


class Steps(Callback):
    """Collects the step of ``last.ckpt`` after each batch."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, []

    def on_train_batch_start(self, *_: Any) -> None:
        self.found.append(step_of(self.path) if self.path.exists() else 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"val_check_interval": 3}, [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]),
        ({"limit_val_batches": 0}, [0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6]),
        ({"val_check_interval": 6}, [0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6]),
    ],
    ids=str,
)
def test_it_is_saved_after_validations_and_epochs(tmp_path: Path, options: dict[str, Any], expected: list[int]) -> None:
    seen = Steps(tmp_path / "last.ckpt")
    trainer(tmp_path, seen, LastCheckpoint(dirpath=str(tmp_path)), enable_checkpointing=True, **options).fit(
        module(), data()
    )
    assert seen.found == expected
    assert step_of(tmp_path / "last.ckpt") == 12


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), (None, [0, 0, 0, 0, 2, 2, 3, 3, 3, 3, 5, 5])],
    ids=["every step", "after validations within a step"],
)
def test_it_is_saved_between_steps_only(tmp_path: Path, every: int | None, expected: list[int]) -> None:
    seen = Steps(tmp_path / "last.ckpt")
    saver = LastCheckpoint(dirpath=str(tmp_path), every_n_steps=every)
    options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "val_check_interval": 3}
    trainer(tmp_path, seen, saver, **options).fit(module(), data())
    assert seen.found == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"val_check_interval": 3},
            "trainer.val_check_interval: is 3 batches, and accumulate_grad_batches is 2: the checkpoint after a "
            "validation would lose gradients; take a multiple of 2 batches.",
        ),
        ({"val_check_interval": "00:00:00:01", "check_val_every_n_epoch": None}, "is a time, and accumulate"),
    ],
    ids=["batches", "time"],
)
def test_checkpoints_within_a_step_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    run = trainer(tmp_path, best(tmp_path), accumulate_grad_batches=2, enable_checkpointing=True, **options)
    with pytest.raises(ValueError, match=sentence):
        run.fit(module(), data())
    assert run.global_step == 0
    trainer(tmp_path, accumulate_grad_batches=2, max_epochs=1, **options).fit(module(), data())  # nothing is saved


def constant() -> MTPModule:
    """A module whose learning rate does not depend on the end of the run."""
    made = module(share_of_positions=0.5)
    made.lr_schedule = None
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None},
        {"max_epochs": -1, "val_check_interval": 3},
        {"max_epochs": -1, "limit_val_batches": 0},
        {"max_epochs": -1, "accumulate_grad_batches": 2, "val_check_interval": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", [(4, 6), pytest.param((7, 12), marks=pytest.mark.slow)], ids=str)
def test_a_run_goes_on_from_it_as_if_it_had_not_ended(
    tmp_path: Path, options: dict[str, Any], ends: tuple[int, int]
) -> None:
    """Ended and resumed twice, with validations in between, it has the weights of a run of 14 steps."""
    whole, last = constant(), tmp_path / "last.ckpt"
    trainer(tmp_path, max_steps=14, **options).fit(whole, data())
    for start, end in zip((0, *ends), (*ends, 14), strict=True):
        resumed = constant()
        saver = LastCheckpoint(dirpath=str(tmp_path))
        run: Trainer = trainer(tmp_path, saver, enable_checkpointing=True, max_steps=end, **options)
        run.fit(resumed, data(), ckpt_path=last if start else None)
        assert step_of(last) == end
    assert_same(resumed.state_dict(), whole.state_dict(), tolerance=0)


class Wrapped(RecurrentTrunk):
    """A trunk that is given a module, which no file can describe."""

    def __init__(self, *, inner: torch.nn.Module) -> None:
        super().__init__(vocab_size=VOCAB, d_model=8)
        self.inner = inner


@pytest.mark.filterwarnings("ignore:fit. Wrapped was made with", "ignore:Checkpoint directory")
def test_a_model_that_no_file_describes_can_be_resumed_and_that_is_said(tmp_path: Path) -> None:
    def made() -> MTPModule:
        trunk, heads = Wrapped(inner=torch.nn.Identity()), LinearHeads(d_model=8, num_horizons=2)
        return MTPModule(trunk=trunk, heads=heads, loss=MultiTokenLoss())

    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    with pytest.warns(UserWarning, match=r"^fit: Wrapped was made with inner=Identity\(\), which no file can describe"):
        trainer(tmp_path, saver, enable_checkpointing=True, max_steps=3).fit(made(), data())
    again = trainer(tmp_path, ModelCheckpoint(dirpath=tmp_path, save_last=True), enable_checkpointing=True, max_steps=5)
    again.fit(made(), data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.global_step == 5
    with pytest.raises(ValueError, match="Wrapped"):
        load_model(tmp_path / "last.ckpt")
