"""Source files that pages name are there."""

import re
from pathlib import Path

import pytest

from tests.architecture.imports import PACKAGE, ROOT

PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/changelog.md"})]
WORKED_EXAMPLES = {"heads/step.py", "tests/unit/heads/test_step.py"}


def named_files(page: str) -> set[str]:
    """Return the Python files with a folder that a page names, without those inside its blocks of code."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    return {name.removeprefix(f"{PACKAGE}/") for name in re.findall(r"`(?:python )?(\w[\w/]*/\w+\.py)\b", prose)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_are_where_a_page_says(path: Path) -> None:
    named = named_files(path.read_text(encoding="utf-8")) - WORKED_EXAMPLES
    places = (ROOT, ROOT / PACKAGE, ROOT / PACKAGE / "decoders")
    assert [name for name in sorted(named) if not any((place / name).is_file() for place in places)] == []


def test_a_file_that_is_gone_is_found() -> None:
    assert named_files("see `decoders/gone.py` and `python tests/x.py --y`\n```python\n`a/b.py`\n```\n") == {
        "decoders/gone.py",
        "tests/x.py",
    }
