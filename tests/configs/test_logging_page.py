"""The configurations on the page about logging do what it says."""

import csv
import re
from pathlib import Path

import pytest

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
