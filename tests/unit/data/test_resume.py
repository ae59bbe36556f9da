"""A real trainer, stopped anywhere and resumed, reads the batches that it would have read without the stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mtp_modules.data import ProgressionDataModule, TextDataModule, TokenDataModule

# lightning 2.6.6 on torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")

EPOCH = 5  # batches
EPOCHS = 3


class Reader(LightningModule):
    """Remembers what it was trained on."""

    def __init__(self, stop_in_step: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.read: list[list[list[int]]] = []
        self.stop_in_step = stop_in_step

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(self.read) == self.stop_in_step:
            raise StoppedError
        self.read.append(batch["tokens"].tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        assert batch["tokens"].shape[1] == 7

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StoppedError(Exception):
    """What a crash is to the trainer."""


class SaveOnCrash(Callback):
    """Save where training broke off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


class SaveAfterBatch(Callback):
    """Save after a batch, in the hook that comes first."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path = path
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.batch:
            trainer.save_checkpoint(self.path)


def data_module(**kwargs: Any) -> TokenDataModule:
    return ProgressionDataModule(
        **{"batch_size": 2, "lookahead": 2, "length": 5, "num_train": 11, "num_val": 2, "num_test": 2} | kwargs
    )


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": list(callbacks),
    }
    return Trainer(**defaults | kwargs)


def whole_run(**kwargs: Any) -> list[list[list[int]]]:
    model = Reader()
    trainer(**kwargs).fit(model, data_module())
    return model.read


def resumed_run(
    path: Path, *callbacks: Callback, data: TokenDataModule | None = None, **kwargs: Any
) -> list[list[list[int]]]:
    model = Reader()
    trainer(*callbacks, **kwargs).fit(model, data or data_module(), ckpt_path=path, weights_only=True)
    return model.read


LENGTHS = [
    pytest.param({}, id="epochs"),
    pytest.param({"max_epochs": -1, "max_steps": 13}, id="steps"),
    pytest.param({"limit_val_batches": 0}, id="no-validation"),
    pytest.param({"limit_train_batches": 3, "max_epochs": 5}, id="limited"),
    pytest.param({"val_check_interval": 2}, id="validates-inside"),
]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_run_reads_the_sequence_without_gaps(length: dict[str, Any]) -> None:
    read = whole_run(**length)
    endless = whole_run(max_epochs=4)
    assert read == endless[: len(read)]
    assert len(read) == (13 if "max_steps" in length else EPOCH * EPOCHS)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [0, 4, 5, 7])
def test_resume_after_a_crash_in_a_step(tmp_path: Path, length: dict[str, Any], batch: int) -> None:
    path = tmp_path / "crash.ckpt"
    model = Reader(stop_in_step=batch)
    with pytest.raises(StoppedError):
        trainer(SaveOnCrash(path), **length).fit(model, data_module())
    assert model.read + resumed_run(path, **length) == whole_run(**length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 5, 7])
def test_resume_after_a_batch(tmp_path: Path, length: dict[str, Any], batch: int) -> None:
    path = tmp_path / "batch.ckpt"
    trainer(SaveAfterBatch(path, batch), **length).fit(Reader(), data_module())
    whole = whole_run(**length)
    assert resumed_run(path, **length) == whole[batch:]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_resume_from_a_checkpoint_of_an_epoch(tmp_path: Path, length: dict[str, Any], at_epoch_end: bool) -> None:
    if length.get("limit_val_batches") == 0 and not at_epoch_end:
        pytest.skip("nothing is saved after a validation that does not run")

    def saver(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=tmp_path / folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end
        )

    trainer(saver("first"), **length).fit(Reader(), data_module())
    whole = whole_run(**length)
    paths = sorted(tmp_path.glob("first/*.ckpt"))
    assert paths
    for path in paths:
        step = torch.load(path, weights_only=True)["global_step"]
        assert resumed_run(path, saver(f"after-{path.stem}"), **length) == whole[step:], path.name


def test_resume_reads_text_in_the_same_order(corpus: Path, tmp_path: Path) -> None:
    def text() -> TokenDataModule:
        return TextDataModule(
            sources=[str(corpus)], window=5, lookahead=2, batch_size=50, val_share=0.2, test_share=0.2, seed=3
        )

    path = tmp_path / "text.ckpt"
    model = Reader()
    trainer(SaveAfterBatch(path, 7), max_epochs=3).fit(model, text())
    assert len(model.read) > 10
    assert resumed_run(path, data=text(), max_epochs=3) == model.read[7:]


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    model, data, run = Reader(), data_module(), trainer(max_epochs=1)
    run.fit(model, data)
    run.fit_loop.max_epochs = 2
    run.fit(model, data)
    assert model.read == whole_run(max_epochs=2)


def test_a_new_trainer_starts_afresh() -> None:
    data, first, second = data_module(), Reader(), Reader()
    trainer(max_epochs=1).fit(first, data)
    trainer(max_epochs=1).fit(second, data)
    assert first.read == second.read


def test_overfitting_reads_the_same_batches_in_every_epoch() -> None:
    read = whole_run(overfit_batches=2)
    assert len(read) == 2 * EPOCHS
    assert read[:2] == read[2:4] == read[4:]


@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero")
def test_a_missing_validation_side_trains(corpus: Path) -> None:
    data = TextDataModule(sources=[str(corpus)], window=5, lookahead=2, batch_size=50, val_share=0.0, test_share=0.2)
    model = Reader()
    trainer(max_steps=3, max_epochs=-1).fit(model, data)
    assert len(model.read) == 3
