"""What is said of the time left."""

import io
import time

import pytest
from rich.console import Console

from mtp_modules.studies.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def begun(out: io.StringIO) -> Progress:
    bar = Progress("tiny", Console(file=out, width=200))
    seconds = {"a": 10.0, "b": 30.0}
    bar.plan(seconds, done=1, expected=40.0, steps={"a": 100, "b": 300}, scale=0.5, workers=1)
    return bar


def test_the_time_left_follows_what_runs_really_take(clock: list[float]) -> None:
    out = io.StringIO()
    bar = begun(out)
    assert bar.left() == 40.0
    clock[0] += 10  # half of what was expected of the first run took as long as all of it
    bar.step("a", 50)
    assert bar.left() == pytest.approx(10 * 35 / 5)
    clock[0] += 10
    bar.done("a")
    assert bar.left() == pytest.approx(20 * 30 / 10)
    bar.failed("b", "a traceback\nbroken")
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "tiny: 3 runs, 1 of them already done, lengths scaled to 0.5 by the budget; 1 at a time, about 40 s."
    )
    assert lines[1:] == ["[2/3] a: done; 60 s left", "[3/3] b: FAILED: broken"]


def test_in_a_terminal_bars_show_every_run_that_is_under_way(clock: list[float]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with Progress("tiny", console) as bar:
        bar.calibrate(2)
        bar.calibrated()
        bar.plan({"a": 10.0}, done=0, expected=10.0, steps={"a": 100}, scale=1.0, workers=1)
        bar.step("a", 50)
        bar.bars.refresh()
        shown = out.getvalue()
        bar.done("a")
    assert "50/100" in shown
    assert "all runs" in shown
