"""Results on disk: whole, checked, or named as unusable."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.studies.results import UnusableResultError, file_name, read_result, write_result

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("results") / "deep" / "a.json"
    write_result(path, content, made_for="x")
    assert read_result(path, made_for="x") == content
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


@given(st.data())
def test_no_changed_byte_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = {"final": {"loss/head_1": 1.25, "steps": 100.0}, "arm": "N = 1"}
    path = tmp_path_factory.mktemp("results") / "a.json"
    write_result(path, content, made_for="x")
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :])
    try:
        found = read_result(path, made_for="x")
    except UnusableResultError:
        return
    assert found == content  # white space, or the same byte


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_file_is_damaged(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.json"
    write_result(path, {"x": list(range(100))}, made_for="x")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UnusableResultError, match="damaged: it is not JSON"):
        read_result(path, made_for="x")


def test_another_study_or_format_is_outdated(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_result(path, made_for="x") is None
    write_result(path, {}, made_for="y")
    with pytest.raises(UnusableResultError, match="outdated: the study, its length or the package has changed since"):
        read_result(path, made_for="x")
    assert read_result(path, made_for=None) == {}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(UnusableResultError, match="outdated: it has format 0, this version writes 1"):
        read_result(path, made_for="y")
    path.write_text("[]")
    with pytest.raises(UnusableResultError, match="damaged: entries are missing"):
        read_result(path, made_for="y")


def test_a_write_that_fails_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_result(path, {"x": 1}, made_for="x")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"a\.json could not be written \(no space left\); what was there is"):
        write_result(path, {"x": 2}, made_for="x")
    assert read_result(path, made_for="x") == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_result(tmp_path / "a.json", {"x": float("nan")}, made_for="x")


@given(st.lists(st.text(max_size=20), min_size=2, max_size=2, unique=True))
def test_labels_have_files_of_their_own(labels: list[str]) -> None:
    names = [file_name(label) for label in labels]
    assert names[0] != names[1]
    assert all("/" not in name and not name.startswith(".") for name in names)
