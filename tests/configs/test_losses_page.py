"""The configuration on the page about the loss trains, and follows its schedule."""

import csv
import re
from pathlib import Path

import pytest

from tests.command_line import ROOT, run

PAGE = (ROOT / "docs/losses.md").read_text(encoding="utf-8")


def test_the_schedule_of_the_page_lowers_the_weight_after_two_thirds(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    config = tmp_path / "schedule.yaml"
    config.write_text(block, encoding="utf-8")
    run(
        *("fit", "--config", ROOT / "configs/notebook.yaml", "--config", config, "--trainer.accelerator=cpu"),
        *("--trainer.max_steps=10", "--trainer.val_check_interval=10", "--trainer.log_every_n_steps=1"),
        f"--trainer.default_root_dir={tmp_path}",
        *("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.logger=CSVLogger"),
        *("--model.freeze=[heads]", "--model.loss.init_args.detach=[unembedding]"),
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    )
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 10
    for step, row in enumerate(rows):
        near, *far = (float(row[f"train/loss/head_{h}"]) for h in (1, 2, 3))
        weight = 0.3 if step / 10 < 0.68 else 0.1
        assert float(row["train/loss"]) == pytest.approx(near + weight * sum(far), rel=1e-5)
