"""The README's Python runs as it stands."""

import re

import pytest

from tests.architecture.imports import ROOT


def test_the_example_trains_and_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("tensor([")
    assert printed.count("[") >= 3
