"""The loop on its page decodes as the decoder does, and the functions that it names are where it says."""

import ast
import re

import pytest

from tests.architecture.imports import PACKAGE, ROOT

PAGE = (ROOT / "docs/decoding_loop.md").read_text(encoding="utf-8")
MOST_LINES = 40


def test_the_loop_runs_in_fewer_passes_than_plain_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(code.splitlines()) <= MOST_LINES
    assert re.findall(r"# (\d)\. (\w+):", code) == [("1", "Draft"), ("2", "Read"), ("3", "Verify"), ("4", "Commit")]
    exec(compile(code, "decoding_loop.md", "exec"), {})  # asserts that the tokens are those of AutoregressiveDecoder
    tokens, passes, plain = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert passes < plain == tokens


def test_the_table_names_functions_that_are_there() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]*`[^|]*) \| ([^|]*`[^|]*\.py`) \|$", PAGE, re.M)
    assert len(rows) == 7
    for functions, files in rows:
        there: set[str] = set()
        for file in re.findall(r"`([\w/]+\.py)`", files):
            for node in ast.walk(ast.parse((ROOT / PACKAGE / file).read_text(encoding="utf-8"))):
                inner = node.body if isinstance(node, ast.ClassDef) else []
                there |= {f"{node.name}.{part.name}" for part in inner if isinstance(part, ast.FunctionDef)}
                there |= {node.name} if isinstance(node, ast.FunctionDef) else set()
        assert set(re.findall(r"`([\w.]+)`", functions)) <= there
