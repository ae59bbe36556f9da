"""The study on the page about studies runs as it is shown."""

import json
import re
from pathlib import Path

from tests.command_line import ROOT, run


def test_the_study_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "own.yaml").write_text(block, encoding="utf-8")
    run("study", tmp_path / "own.yaml", "--output", tmp_path, "--workers", "1", "--seeds", "1")
    table = (tmp_path / "own" / "tables" / "1-results.md").read_text(encoding="utf-8")
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == [
        *("one head", "weight 1.0", "weight 0.1", "weight 0.1, rate 0.003", "weight 0.1, rate 0.03"),
    ]
    runs = (json.loads(path.read_text(encoding="utf-8"))["content"] for path in (tmp_path / "own/runs").glob("*.json"))
    rates = {found["arm"]: found["settings"]["model"]["optimizer"]["init_args"]["lr"] for found in runs}
    assert rates == {
        **dict.fromkeys(("one head", "weight 1.0", "weight 0.1"), 0.01),
        **{"weight 0.1, rate 0.003": 0.003, "weight 0.1, rate 0.03": 0.03},
    }
    losses = [row.split("|")[2].strip() for row in table.splitlines()[4:]]
    assert len(set(losses)) == 3, "another rate must train another model"
    assert "Loss of horizon 1, nats: one head has" in (tmp_path / "own" / "verdict.md").read_text(encoding="utf-8")
