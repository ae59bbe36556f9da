"""Small corpora of real files."""

from pathlib import Path

import pytest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a folder of 60 Python files of unequal length in three folders, and one file of another kind."""
    root = tmp_path / "corpus"
    for number in range(60):
        path = root / f"part{number % 3}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"line {line} of {number}\n" for line in range(3 + number % 7)), encoding="utf-8")
    (root / "notes.md").write_text("no code", encoding="utf-8")
    return root
