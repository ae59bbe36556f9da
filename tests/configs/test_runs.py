"""Every configuration runs: a few real steps of each command, and decoding from nothing but the checkpoint."""

import contextlib
import io
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtp_modules import MTPModel
from mtp_modules.core import Tokenizer
from mtp_modules.loading import load_model
from tests.command_line import CONFIGS, ROOT, run

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

LIMITS = [
    *("--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2", "--trainer.limit_predict_batches=2"),
    *("--trainer.accelerator=cpu", "--trainer.logger=false"),
]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def other_data(config: Path) -> list[str]:
    """Return arguments that put a small corpus in the place of a large one, which `fit` has read already."""
    given = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["init_args"]
    if "sources" not in given:
        return []
    shares = ["--data.init_args.val_share=0.2", "--data.init_args.test_share=0.2"]
    return [f"--data.init_args.sources=[{ROOT / 'mtp_modules'}, {ROOT / 'tests'}]", *shares]


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train three steps, and return the folder of the run and the last line that it printed."""
    folder = tmp_path_factory.mktemp(config.stem)
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", f"--trainer.default_root_dir={folder}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run("fit", "--config", config, *LIMITS, *steps)
    return folder, printed.getvalue().splitlines()[-1]


@pytest.fixture(scope="module")
def run_folder(finished: tuple[Path, str]) -> Path:
    return finished[0]


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> tuple[MTPModel, Tokenizer | None]:
    return load_model(run_folder)


def test_fit_leaves_the_best_and_the_last_checkpoint(run_folder: Path) -> None:
    names = [path.name for path in sorted((run_folder / "checkpoints").iterdir())]
    assert names == ["best.ckpt", "last.ckpt"]
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3


def test_the_saved_configuration_says_the_same(config: Path, run_folder: Path) -> None:
    saved = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert saved["trainer"]["max_steps"] == 3
    for part in ("trunk", "heads"):
        assert saved["model"][part]["init_args"].items() >= given["model"][part]["init_args"].items()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_prints_the_table(
    config: Path, run_folder: Path, other_data: list[str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folders = [f"--ckpt_path={run_folder}", f"--trainer.default_root_dir={run_folder}"]
    used = config if command == "validate" else next(run_folder.rglob("config.yaml"))  # as given, and as fit wrote it
    run(command, "--config", used, *LIMITS, *other_data, *folders)
    printed = capsys.readouterr().out
    stage = {"validate": "val", "test": "test"}[command]
    assert f"{stage}: every head" in printed
    assert "mean accepted length" in printed


def test_predict_writes_predictions(config: Path, run_folder: Path, other_data: list[str], tmp_path: Path) -> None:
    folders = [f"--ckpt_path={run_folder}", f"--trainer.default_root_dir={tmp_path}"]
    run("predict", "--config", config, *LIMITS, *other_data, *folders)
    written = load_file(tmp_path / "predictions.safetensors")
    rows, length, horizons = written["predicted"].shape
    assert written["tokens"].shape == (rows, length + horizons)
    assert rows > 0


def test_fit_goes_on_from_a_folder(config: Path, run_folder: Path, other_data: list[str], tmp_path: Path) -> None:
    run(
        *("fit", "--config", config, *LIMITS, *other_data, "--trainer.max_steps=4", "--trainer.val_check_interval=4"),
        *(f"--ckpt_path={run_folder}", f"--trainer.default_root_dir={tmp_path}"),
    )
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4


def test_the_last_line_of_a_run_is_a_command_that_works(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = "Next: python -m mtp_modules "
    assert finished[1].startswith(f"{start}generate --ckpt_path {finished[0]}")
    run(*shlex.split(finished[1].removeprefix(start)), "--max_new_tokens=16", "--repeats=1")
    assert "outputs             identical" in capsys.readouterr().out


def test_generate_needs_nothing_but_the_checkpoint(
    run_folder: Path, loaded: tuple[MTPModel, Tokenizer | None], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "1 2 3" if loaded[1] is None else "def "
    run(
        *("generate", "--ckpt_path", run_folder, "--prompt", prompt),
        *("--max_new_tokens", "24", "--compare", "true", "--repeats", "1"),
    )
    printed = capsys.readouterr().out
    assert printed.startswith(prompt)
    assert "\033" not in printed.partition("\n")[0], "colours are for terminals"
    depths = ", ".join(str(depth) for depth in range(1, len(loaded[0].horizons)))
    (accepted,) = (line for line in printed.splitlines() if line.startswith("accepted by depth"))
    assert [part.split(":")[0] for part in accepted.split()[3::2]] == depths.split(", ")
    assert "outputs             identical" in printed
    if loaded[1] is None:
        new = printed.splitlines()[0].removeprefix(prompt).split()
        assert len(new) == 24
        assert all(0 <= int(token) < loaded[0].trunk.vocab_size for token in new)
