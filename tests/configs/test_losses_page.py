"""The configuration on the page about the loss trains, and follows its schedule."""

import csv
import math
import re
from pathlib import Path

import pytest
import yaml

from mtp_modules.configuration import assemble
from tests.command_line import ROOT, run

PAGE = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_schedule_of_the_page_lowers_the_weight_after_two_thirds(tmp_path: Path) -> None:
    block = BLOCKS[0]
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


def test_the_loss_of_drafters_on_the_page_is_one_that_can_be_built() -> None:
    (section,) = (yaml.safe_load(block)["model"] for block in BLOCKS[1:])
    heads = {"class_path": "RecurrentHeads", "init_args": {"num_horizons": 4}}
    trunk = {"class_path": "RecurrentTrunk", "init_args": {"vocab_size": 256, "d_model": 8}}
    data = {"class_path": "TextDataModule", "init_args": {"sources": ["README.md"], "window": 8, "batch_size": 1}}
    loss = assemble({"trunk": trunk, "heads": heads, **section}, data)[0].loss
    assert (loss.distillation, loss.total_variation) == (0.9, 1.0)
    assert loss.horizon_weights(4) == [1.0, *(pytest.approx(math.exp(-k / 4)) for k in range(3))]
