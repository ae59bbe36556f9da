"""What a run shows and writes: nothing that is not the user's, few charts, and one folder whatever the logger."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from mtp_modules.configuration.run_folder import ORIGIN
from mtp_modules.configuration.trainer_folders import configured_folder
from tests.command_line import ROOT, run

SMALL = (
    *("fit", "--config", ROOT / "configs/notebook.yaml", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0"),
    *("--data.init_args.num_train=64", "--data.init_args.num_val=32", "--data.init_args.num_test=32"),
)


class SilentLogger(Logger):
    """Stands in for Weights & Biases: it makes folders of its own below ``save_dir``."""

    def __init__(self, name: str | None = None, save_dir: str = ".", project: str = "lightning_logs") -> None:
        super().__init__()
        self._name, self._save_dir, self.project = name, save_dir, project

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return "1a2b3c"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        folder = Path(self._save_dir, "wandb")
        folder.mkdir(exist_ok=True)
        with (folder / "figures.txt").open("a", encoding="utf-8") as file:
            file.write(f"{step} {sorted(metrics)}\n")


class PlainLogger(SilentLogger):
    """Has no folder at all."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def save_dir(self) -> None:  # type: ignore[override]
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files() -> set[str]:
    return {path.as_posix() for path in Path().rglob("*") if path.is_file() and path.name != ORIGIN}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train eight heads for two steps, and return the folder of the run."""
    folder = tmp_path_factory.mktemp("eight")
    place = f"--trainer.logger.init_args.save_dir={folder}"
    run(*SMALL, "--model.heads.init_args.num_horizons=8", "--data.init_args.length=12", place)
    return folder / "notebook"


def test_nothing_is_said_that_is_not_of_the_run(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as warned, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # Python shows none of libraries
        run(*SMALL)
    assert [str(warning.message) for warning in warned] == []
    out, err = capfd.readouterr()
    said = "\n".join([out, err, *caplog.messages])
    assert "every head" in said
    assert "│ heads       │ LinearHeads" in said
    for word in ("Tip:", "litlogger", "litmodels", "FLOPs", "LeafSpec", "directory", "weights_only", "Warning"):
        assert word not in said, word


def test_eight_heads_make_few_charts(eight: Path) -> None:
    """TensorBoard's page of custom scalars has every figure, in one chart each."""
    found = EventAccumulator(str(eight)).Reload()
    tags = {tag for tag in found.Tags()["scalars"] if tag != "hp_metric"}
    layout = layout_pb2.Layout()
    layout.ParseFromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
    lines = {tag: [chart for chart in charts if any(re.match(pattern, tag) for pattern in chart)] for tag in tags}
    shown = {tuple(chart) for matching in lines.values() for chart in matching}
    assert len(tags) > 60
    assert [tag for tag, matching in lines.items() if len(matching) != 1] == []
    assert len(shown) <= 24


def test_the_learning_rate_is_logged(eight: Path) -> None:
    found = EventAccumulator(str(eight)).Reload()
    events = found.Scalars("train/lr")
    assert [event.step for event in events] == [0, 1]
    assert [event.value for event in events] == pytest.approx([0.003 / 20, 0.003 * 2 / 20])  # warm-up of 20 steps


NAMED = ("--trainer.logger.save_dir=runs", "--trainer.logger.name=notebook")
LOGGERS: dict[str, tuple[list[str], set[str]]] = {
    "tensorboard": ([], {"hparams.yaml"}),
    "csv": (
        ["--trainer.logger=CSVLogger", *NAMED, "--trainer.logger.version="],
        {"metrics.csv"},
    ),
    "another": (
        [
            f"--trainer.logger={__name__}.SilentLogger",
            "--trainer.logger.save_dir=runs",
            "--trainer.logger.name=notebook",
        ],
        {"wandb/figures.txt"},
    ),
    "without a folder": (
        [f"--trainer.logger={__name__}.PlainLogger", "--trainer.default_root_dir=runs/notebook"],
        set(),
    ),
    "none": (["--trainer.logger=false", "--trainer.default_root_dir=runs/notebook"], set()),
}


@pytest.mark.parametrize(("options", "figures"), LOGGERS.values(), ids=LOGGERS)
def test_configuration_checkpoints_and_figures_are_in_one_folder(options: list[str], figures: set[str]) -> None:
    run(*SMALL, *options)
    written = {name.removeprefix("runs/notebook/") for name in files()}
    wanted = figures | {"config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert {name for name in written if "tfevents" not in name} - {"runs/.notebook.lock"} == wanted
    saved = yaml.safe_load(Path("runs/notebook/config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["max_epochs"] == 1


def test_a_run_with_another_logger_is_found_again(capsys: pytest.CaptureFixture[str]) -> None:
    options, _ = LOGGERS["another"]
    run(*SMALL, *options)
    run(*SMALL, *options)
    checkpoint, command = capsys.readouterr().out.splitlines()[-2:]
    assert checkpoint.endswith("runs/notebook-2/checkpoints/best.ckpt")
    run(*shlex.split(command.removeprefix("Next: python -m mtp_modules ")), "--max_new_tokens=8", "--repeats=1")
    assert "outputs             identical" in capsys.readouterr().out
    run(*SMALL, *options, "--ckpt_path=last", "--trainer.max_epochs=2")
    last = torch.load("runs/notebook-2/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    saved = yaml.safe_load(Path("runs/notebook-2/config.yaml").read_text(encoding="utf-8"))
    logger = saved["trainer"]["logger"]
    logger = Namespace(class_path=logger["class_path"], init_args=Namespace(**logger["init_args"]))
    assert configured_folder(Namespace(logger=logger)) == Path("runs/notebook-2")


def test_weights_and_biases_offline(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    options = ("--trainer.logger.offline=true", "--trainer.logger.save_dir=runs", "--trainer.logger.name=notebook")
    run(*SMALL, "--trainer.logger=WandbLogger", *options)
    assert {"runs/notebook/config.yaml", "runs/notebook/checkpoints/best.ckpt"} <= files()
    assert any(name.startswith("runs/notebook/wandb/") for name in files())


def test_one_head_has_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    run(*SMALL, "--model.heads.init_args.num_horizons=1")
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--compare" not in command
    run(*shlex.split(command.removeprefix("Next: python -m mtp_modules ")), "--max_new_tokens=8")
