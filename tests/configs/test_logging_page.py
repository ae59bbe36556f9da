"""The configurations on the page about logging do what it says."""

import csv
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_line import ROOT, run

BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/logging.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize(
    ("name", "keys"), [("TokenThroughput", {"train/mfu"}), ("GradientConflict", {"train/grad_ratio"})]
)
def test_a_callback_of_the_page_logs_its_key(tmp_path: Path, name: str, keys: set[str]) -> None:
    (block,) = (block for block in BLOCKS if name in block)
    config = tmp_path / "callback.yaml"
    config.write_text(block.replace("every_n_steps: 100", "every_n_steps: 2"), encoding="utf-8")
    run(
        *("fit", "--config", ROOT / "configs/notebook.yaml", "--config", config, "--trainer.accelerator=cpu"),
        *("--trainer.max_steps=2", "--trainer.log_every_n_steps=2", f"--trainer.default_root_dir={tmp_path}"),
        *("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.logger=CSVLogger"),
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    )
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for key in keys:
        assert any(0 < float(row[key]) < 100 for row in rows if row[key])


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_tensorboard_starts_and_finds_every_head(tmp_path: Path) -> None:
    run(
        *("fit", "--config", ROOT / "configs/notebook.yaml", "--trainer.accelerator=cpu", "--trainer.max_steps=2"),
        *("--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"),
        *("--trainer.limit_test_batches=1", f"--trainer.default_root_dir={tmp_path}"),
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    )
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    found = EventAccumulator(str(folder)).Reload()
    for head in (1, 2, 3):
        assert [event.step for event in found.Scalars(f"train/loss/head_{head}")] == [0, 1]
    from tensorboard import program  # warns of what it brings along

    board = program.TensorBoard()
    board.configure(("tensorboard", "--logdir", str(tmp_path)))
    assert board.flags.logdir == str(tmp_path)
