"""What the page about tasks shows is what runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from tests.command_line import ROOT, run

PAGE = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
LIMITS = ("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.accelerator=cpu")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_examples_are_drawn_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (code,), (shown,) = blocks("python"), blocks("text")
    exec(compile(code, "tasks.md", "exec"), {})
    assert capsys.readouterr().out == shown


def fit(folder: Path, *arguments: object) -> None:
    steps = ("--trainer.max_steps=3", "--trainer.val_check_interval=3", f"--trainer.default_root_dir={folder}")
    logger = "--trainer.logger=false"
    run("fit", "--config", ROOT / "configs/notebook.yaml", *map(str, arguments), *steps, *LIMITS, logger)


def test_a_task_and_a_teacher_are_configured_as_shown(tmp_path: Path) -> None:
    data, teacher = tmp_path / "data.yaml", tmp_path / "teacher.yaml"
    block = yaml.safe_load(blocks("yaml")[0])
    block["data"]["init_args"] |= {"num_val": 4, "num_test": 4}
    data.write_text(yaml.safe_dump(block), encoding="utf-8")
    teacher.write_text(blocks("yaml")[1].replace("runs/teacher", str(tmp_path / "first")), encoding="utf-8")
    vocabulary = "--model.trunk.init_args.vocab_size=12"
    fit(tmp_path / "first", "--config", data, vocabulary)
    fit(tmp_path / "second", "--config", data, "--config", teacher, vocabulary)
    checkpoint = torch.load(tmp_path / "second/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["mtp_modules"]["tokenizer"]["class_path"].endswith("WordTokenizer")
