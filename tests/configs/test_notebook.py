"""The notebook's experiment reaches the ceiling of its task at every horizon."""

import sys
from pathlib import Path

import pytest

from mtp_modules.cli import MTPCLI
from tests.command_line import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> MTPCLI:
    """Run the whole configuration; its `fit` ends with the test of the best checkpoint."""
    command = ["fit", "--config", str(ROOT / "configs" / "notebook.yaml"), "--trainer.logger=false"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"]
    monkeypatch.setattr(sys, "argv", ["python -m mtp_modules", *command, *quiet, *arguments])
    return MTPCLI()


def assert_at_ceiling(cli: MTPCLI, *, accuracy: float, nats: float) -> None:
    """Compare the test's figures with the best that is possible; the test's own draw of rows adds a little noise."""
    ceiling, found = cli.datamodule.ceiling(cli.model.model.horizons), cli.trainer.callback_metrics
    for index, (best, lowest) in enumerate(zip(ceiling.accuracy, ceiling.nll, strict=True)):
        assert float(found[f"test/accuracy/head_{index + 1}"]) > best - accuracy
        assert float(found[f"test/loss/head_{index + 1}"]) < lowest + nats
    # Only drafts made at the first position can be wrong, and are when the step is guessed wrong.
    length, far = cli.datamodule.length, len(ceiling.accuracy) - 1
    wrong = (1 - ceiling.accuracy[0]) * length / (length - far)
    assert float(found["test/accepted_length"]) >= 1 + far * (1 - wrong) - far * accuracy


def test_a_few_epochs_come_close(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_at_ceiling(train(monkeypatch, tmp_path, "--trainer.max_epochs=4"), accuracy=0.01, nats=0.05)


HORIZONS = {"one": ["--model.heads.init_args.num_horizons=1"], "three": []}
WEIGHTS = {
    "equal": [],
    "decaying": [
        "--model.loss.init_args.weights=GeometricWeights",
        "--model.loss.init_args.weights.init_args.gamma=0.5",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("horizons", HORIZONS)
def test_the_whole_run_reaches_the_ceiling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, horizons: str, weights: str
) -> None:
    cli = train(monkeypatch, tmp_path, *HORIZONS[horizons], *WEIGHTS[weights])
    assert_at_ceiling(cli, accuracy=0.003, nats=0.005)
