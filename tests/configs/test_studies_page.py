"""The study on the page about studies runs as it is shown."""

import json
import re
from pathlib import Path

import pytest

from mtp_modules.reports.requests import check_requests
from mtp_modules.studies import load_study
from tests.command_line import ROOT, run

ARMS = ["one head", "weight 1.0", "weight 0.1", "weight 0.1, rate 0.003", "weight 0.1, rate 0.03"]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return the file that the page shows."""
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "own.yaml").write_text(block, encoding="utf-8")
    return tmp_path / "own.yaml"


def test_the_study_of_the_page_is_in_order(study: Path) -> None:
    asked = load_study(str(study))
    check_requests(asked)
    assert list(asked.arm_names) == ARMS


@pytest.mark.nightly
def test_the_study_of_the_page_runs(study: Path, tmp_path: Path) -> None:
    run("study", study, "--output", tmp_path, "--workers", "1", "--seeds", "1")
    table = (tmp_path / "own" / "tables" / "1-results.md").read_text(encoding="utf-8")
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == ARMS
    runs = (json.loads(path.read_text(encoding="utf-8"))["content"] for path in (tmp_path / "own/runs").glob("*.json"))
    rates = {found["arm"]: found["settings"]["model"]["optimizer"]["init_args"]["lr"] for found in runs}
    assert rates == {
        **dict.fromkeys(("one head", "weight 1.0", "weight 0.1"), 0.01),
        **{"weight 0.1, rate 0.003": 0.003, "weight 0.1, rate 0.03": 0.03},
    }
    losses = [row.split("|")[2].strip() for row in table.splitlines()[4:]]
    assert len(set(losses)) == 3, "another rate must train another model"
    assert "Loss of horizon 1, nats: one head has" in (tmp_path / "own" / "verdict.md").read_text(encoding="utf-8")
