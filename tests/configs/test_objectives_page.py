"""The configuration on the page about auxiliary objectives trains, and its loop runs."""

import csv
import re
from pathlib import Path

import pytest

from tests.command_line import ROOT, run

PAGE = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")


def test_the_configuration_trains_and_what_it_saves_decodes(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    config = tmp_path / "page.yaml"
    config.write_text(block, encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text("what comes after the next word\n" * 400, encoding="utf-8")
    run(
        *("fit", "--config", config, "--data=TextDataModule", f"--data.sources=[{text}]", "--data.window=32"),
        *("--data.batch_size=4", "--data.val_share=0.2", "--data.test_share=0.2", "--trainer.accelerator=cpu"),
        *("--trainer.max_steps=4", "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=1"),
        *("--trainer.logger=CSVLogger", f"--trainer.logger.init_args.save_dir={tmp_path}"),
        "--trainer.logger.init_args.name=run",
    )
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 4
    for row in rows:
        weights = {"loss/head_1": 1, "token_order/loss": 1, "future_bag/loss": 0.5}
        weights |= {"next_word/loss": 0.25, "next_sentence/loss": 0.25}
        assert float(row["train/loss"]) == pytest.approx(
            sum(weight * float(row[f"train/{name}"]) for name, weight in weights.items()), rel=1e-5
        )
    run("generate", f"--ckpt_path={path.parent}", "--prompt=what", "--max_new_tokens=4", "--device=cpu")


def test_the_loop_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["added"].examples == 4 * 32
