"""What a run shows, writes, and does when it is told to stop."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from mtp_modules.loading import load_model
from mtp_modules.training import GracefulStop, HeadsProgressBar, HeadsTable, PredictionWriter
from mtp_modules.training.callbacks import by_head
from tests.helpers import assert_same
from tests.unit.training.running import SaveAt, data, module, trainer


@pytest.fixture(autouse=True)
def _same_handlers() -> Iterator[None]:
    """Fail if a test leaves another signal handler behind."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Kill(Callback):
    """Send this process a signal in the middle of a batch."""

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch = number, batch

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    model, stop = module(), GracefulStop()
    run = trainer(tmp_path, stop, Kill(number, 3), max_epochs=9)
    run.fit(model, data())
    assert run.global_step == 4
    assert stop.received == number
    assert stop.saved == str(tmp_path / "last.ckpt")
    loaded, _ = load_model(tmp_path / "last.ckpt")
    assert_same(loaded.state_dict(), model.model.state_dict(), tolerance=0)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, stopped, resumed = module(), module(), module()
    trainer(tmp_path).fit(whole, data())
    trainer(tmp_path, GracefulStop(), Kill(signal.SIGINT, 7)).fit(stopped, data())
    trainer(tmp_path).fit(resumed, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert_same(resumed.state_dict(), whole.state_dict(), tolerance=0)


def test_a_run_stops_between_optimizer_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, GracefulStop(), Kill(signal.SIGINT, 2), accumulate_grad_batches=3)
    run.fit(module(), data())
    assert run.global_step == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_the_checkpoint_lies_beside_the_others(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "all")
    stop = GracefulStop()
    trainer(tmp_path, stop, Kill(signal.SIGINT, 1), saver, enable_checkpointing=True).fit(module(), data())
    assert stop.saved == str(tmp_path / "all" / "last.ckpt")


def test_without_a_signal_nothing_is_saved(tmp_path: Path) -> None:
    stop = GracefulStop()
    trainer(tmp_path, stop, max_epochs=1).fit(module(), data())
    assert (stop.received, stop.saved, list(tmp_path.iterdir())) == (None, None, [])


def test_an_error_gives_the_signals_back(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_before_backward(self, *_: Any) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, GracefulStop(), Fail()).fit(module(), data())


def test_a_second_signal_ends_the_run_at_once_but_not_a_save(tmp_path: Path) -> None:
    run, model, stop = trainer(tmp_path), module(), GracefulStop()
    stop.on_train_start(run, model)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    stop.on_save_checkpoint(run, model, {})
    os.kill(os.getpid(), signal.SIGTERM)
    stop.on_train_batch_start(run, model, None, 0)
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    stop.on_train_end(run, model)


class Watch(Callback):
    """Remembers how long the bar is in each epoch, and what stands behind it in the end."""

    def __init__(self, bar: HeadsProgressBar) -> None:
        self.bar, self.totals, self.shown = bar, [], {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        total = self.bar.train_progress_bar.total
        if (trainer.current_epoch, total) not in self.totals:
            self.totals.append((trainer.current_epoch, total))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.shown = self.bar.get_metrics(trainer, pl_module)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 2}, [(0, 6), (1, 6)]),
        ({"max_epochs": -1, "max_steps": 9}, [(0, 6), (1, 3)]),
        ({"max_epochs": 9, "max_steps": 9}, [(0, 6), (1, 3)]),
        ({"max_epochs": -1, "max_steps": 4}, [(0, 4)]),
        ({"max_epochs": -1, "max_steps": 4, "accumulate_grad_batches": 2}, [(0, 6), (1, 2)]),
        ({"max_epochs": -1, "max_steps": 4, "limit_train_batches": 3}, [(0, 3), (1, 1)]),
    ],
    ids=str,
)
def test_the_bar_knows_where_max_steps_ends_an_epoch(
    tmp_path: Path, limits: dict[str, int], expected: list[tuple[int, int]]
) -> None:
    bar = HeadsProgressBar()
    watch = Watch(bar)
    trainer(tmp_path, bar, watch, enable_progress_bar=True, **limits).fit(module(), data())
    assert watch.totals == expected


def test_the_bar_of_a_resumed_run_is_as_long(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    trainer(tmp_path, SaveAt(path, 2)).fit(module(), data())
    bar = HeadsProgressBar()
    watch = Watch(bar)
    run = trainer(tmp_path, bar, watch, enable_progress_bar=True, max_epochs=-1, max_steps=5)
    run.fit(module(), data(), ckpt_path=path, weights_only=True)
    assert watch.totals == [(0, 5)]


def test_the_bar_shows_loss_accuracy_and_speed(tmp_path: Path) -> None:
    bar = HeadsProgressBar()
    watch = Watch(bar)
    trainer(tmp_path, bar, watch, enable_progress_bar=True).fit(module(), data())
    shown = watch.shown
    assert list(shown) == ["loss", "acc%", "tok/s", "val"]
    assert float(shown["loss"]) > 0
    assert [0 <= int(percent) <= 100 for percent in shown["acc%"].split("/")] == [True] * 3
    assert int(shown["tok/s"]) > 0


def test_by_head_sorts_by_number() -> None:
    metrics = {f"val/loss/head_{h}": torch.tensor(float(h)) for h in (10, 2, 1)} | {"val/loss": torch.tensor(7.0)}
    assert by_head(metrics, "val/loss") == [1.0, 2.0, 10.0]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_table_ends_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    run = trainer(tmp_path, HeadsTable())
    (figures,) = getattr(run, stage)(module(), data(), verbose=False)
    printed = capsys.readouterr().out
    name = {"validate": "val", "test": "test"}[stage]
    assert f"{name}: every head" in printed
    assert f"mean accepted length {figures[f'{name}/accepted_length']:.2f} of 3" in printed
    for h in (1, 2, 3):
        (row,) = (line for line in printed.splitlines() if line.startswith(f"│       {h} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1] == f"{figures[f'{name}/loss/head_{h}']:.4f}"
        assert cells[2] == f"{figures[f'{name}/accuracy/head_{h}']:.1%}"
        assert cells[3] == f"{figures[f'{name}/top5_accuracy/head_{h}']:.1%}"


def test_no_table_inside_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, HeadsTable(), max_epochs=1).fit(module(), data())
    assert "every head" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_predictions_are_written(tmp_path: Path) -> None:
    rows = data(num_test=11)
    predicted = trainer(tmp_path, PredictionWriter()).predict(module(), rows)
    written = load_file(tmp_path / "predictions.safetensors")
    assert written["tokens"].shape == (11, 9)
    for name in ("tokens", "predicted"):
        assert torch.equal(written[name], torch.cat([batch[name] for batch in predicted]))
