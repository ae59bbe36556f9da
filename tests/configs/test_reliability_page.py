"""What the page on reliability shows works as it is shown."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from mtp_modules.loading import read_checkpoint
from tests.command_line import ROOT, run

PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
FENCED = r"^```{}\n(.*?)^```$"
SMALL = {"num_train": 64, "num_val": 32, "num_test": 32}


def block(language: str) -> str:
    (found,) = re.findall(FENCED.format(language), PAGE, re.M | re.S)
    return str(found)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write ``my.yaml``, a tiny run in ``runs/name``."""
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((ROOT / "configs/notebook.yaml").read_text(encoding="utf-8"))
    content["trainer"] |= {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    content["trainer"]["logger"]["init_args"]["name"] = "name"
    content["data"]["init_args"] |= SMALL
    Path("my.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty", "ignore:The dirpath has changed")
@pytest.mark.usefixtures("config")
def test_the_commands_go_on_or_start_anew() -> None:
    run("fit", "--config", "my.yaml", "--trainer.max_epochs=1")
    steps = [int(read_checkpoint(Path("runs/name/checkpoints/last.ckpt"))["global_step"])]
    for epochs, line in enumerate(block("bash").splitlines(), start=2):
        command = shlex.split(line, comments=True)
        assert command[:3] == ["python", "-m", "mtp_modules"]
        run(*command[3:], f"--trainer.max_epochs={epochs}")
        steps.append(int(read_checkpoint(Path("runs/name/checkpoints/last.ckpt"))["global_step"]))
    assert steps == [2, 4, 6, 6]
    assert read_checkpoint(Path("runs/name-2/checkpoints/last.ckpt"))["global_step"] == 8


@pytest.mark.usefixtures("config")
def test_the_callback_saves_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, save = [], Trainer.save_checkpoint

    def noted(self: Trainer, path: Any, *more: Any, **options: Any) -> None:
        if Path(path).name == "last.ckpt":
            steps.append(self.global_step)
        save(self, path, *more, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", noted)
    Path("often.yaml").write_text(block("yaml").replace("500", "1"), encoding="utf-8")
    run("fit", "--config", "my.yaml", "--config", "often.yaml", "--trainer.max_epochs=2")
    assert steps == [1, 2, 3, 4]


def test_the_example_of_an_atomic_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
