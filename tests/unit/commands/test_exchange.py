"""``python -m mtp_modules export`` and ``import``."""

from pathlib import Path

import pytest
import torch

from mtp_modules import MTPModel
from tests import interop
from tests.command_line import refusal, run
from tests.interop import all_logits, some_tokens


def test_a_model_goes_out_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokens = interop.mimo(), some_tokens()
    model.save_pretrained(tmp_path / "ours")
    run("export", "mimo", "--ckpt_path", tmp_path / "ours", "--out", tmp_path / "mimo")
    run("import", "mimo", "--path", tmp_path / "mimo", "--out", tmp_path / "back")
    assert f"Next: python -m mtp_modules generate --ckpt_path {tmp_path / 'back'}" in capsys.readouterr().out
    back, _ = MTPModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def test_heads_alone_come_back_on_their_trunk(tmp_path: Path) -> None:
    model, tokens = interop.medusa(), some_tokens()
    model.save_pretrained(tmp_path / "ours")
    ours = tmp_path / "ours"
    run("export", "--format", "medusa", "--ckpt_path", ours, "--out", tmp_path / "medusa")
    run("import", "--format", "medusa", "--path", tmp_path / "medusa", "--trunk", ours, "--out", tmp_path / "back")
    back, _ = MTPModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, tokens), all_logits(back, tokens), strict=True))


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    interop.glm().save_pretrained(tmp_path)
    said = refusal("export", "hf", "--ckpt_path", tmp_path, "--out", tmp_path / "out")
    assert said.startswith("format: 'hf' is unknown. Known: mtp_modules, deepseek, glm, qwen,")
    assert not (tmp_path / "out").exists()


def test_a_model_before_training_is_compared_with(tmp_path: Path) -> None:
    interop.glm().save_pretrained(tmp_path)
    said = refusal("export", "glm", "--ckpt_path", tmp_path, "--before", tmp_path, "--out", tmp_path / "out")
    assert said == (
        "export: training did not change heads.steps.0.state_norm.weight; export the checkpoint of the trained model."
    )
