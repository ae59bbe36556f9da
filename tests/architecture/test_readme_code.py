"""The README's Python runs as it stands."""

import re

import pytest
import torch

from mtp_modules import MTPModel, RecurrentHeads, TransformerTrunk
from tests.architecture.imports import ROOT


def test_the_example_trains_and_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("tensor([")
    assert printed.count("[") >= 3


def test_the_examples_on_the_page_about_heads_build_models() -> None:
    page = (ROOT / "docs/heads.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    names: dict[str, MTPModel] = {}
    exec(compile(code, "heads.md", "exec"), names)
    assert [len(names[name](torch.zeros(1, 9, dtype=torch.long))) for name in ("medusa", "model")] == [5, 3]


def test_the_first_example_on_the_page_about_trunks_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/trunks.md").read_text(encoding="utf-8")
    code, *_ = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)  # the others: tests/unit/trunks
    exec(compile(code, "trunks.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[[")


def test_the_examples_on_the_page_about_decoding_decode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/decoding.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    trunk = TransformerTrunk(vocab_size=9, d_model=16, num_layers=1, num_heads=2, max_positions=128)
    model = MTPModel(trunk=trunk, heads=RecurrentHeads(d_model=16, num_horizons=4)).eval()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the graphs have tests of their own
    exec(compile(code, "decoding.md", "exec"), {"model": model})
    assert capsys.readouterr().out.startswith("[[")
