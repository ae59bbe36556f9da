"""The README's Python runs as it stands."""

import re

import pytest

from mtp_modules import MTPModel, RecurrentHeads, TransformerTrunk
from tests.architecture.imports import ROOT


def test_the_example_trains_and_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("tensor([")
    assert printed.count("[") >= 3


def test_the_example_on_the_page_about_decoding_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/decoding.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    trunk = TransformerTrunk(vocab_size=9, d_model=16, num_layers=1, num_heads=2, max_positions=128)
    model = MTPModel(trunk=trunk, heads=RecurrentHeads(d_model=16, num_horizons=4)).eval()
    exec(compile(code, "decoding.md", "exec"), {"model": model})
    assert capsys.readouterr().out.startswith("[[")
