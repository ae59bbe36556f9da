"""The study command, end to end: runs in processes of their own, resumes, refusals, and the report."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import ROOT, refusal, run
from tests.unit.studies.tiny import written

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


def start(yaml: Path, output: Path, *more: str) -> None:
    """Do `study YAML` with one worker."""
    run("study", yaml, "--output", output, "--workers", "1", *more)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the tiny study, and return the folder that holds `tiny.yaml`, `bare/tiny.yaml` and `out/tiny`."""
    folder = tmp_path_factory.mktemp("study")
    start(written(folder), folder / "out")
    (folder / "bare").mkdir()
    written(folder / "bare", figures=[])  # the same runs, and no time for drawing
    return folder


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the contents of the result files by name."""
    files = (folder / "runs").glob("*.json")
    return {path.name: json.loads(path.read_text(encoding="utf-8"))["content"] for path in files}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*.json")}


def test_it_leaves_results_figures_tables_and_a_page(done: Path) -> None:
    folder = done / "out" / "tiny"
    found = results(folder)
    assert sorted((result["arm"], result["seed"]) for result in found.values()) == [
        *(("N = 1", 1), ("N = 1", 2), ("N = 2", 1), ("N = 2", 2))
    ]
    for result in found.values():
        assert result["steps"] == 8
        assert result["settings"]["data"]["init_args"]["seed"] == result["seed"]
        assert result["versions"]["torch"]
        assert result["machine"]["cores"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"python -m mtp_modules study {done / 'tiny.yaml'} --seeds 2" in page
    assert len(list((folder / "figures").iterdir())) == 8
    assert len(list((folder / "tables").iterdir())) == 4


def test_done_again_it_trains_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(done / "out" / "tiny")
    start(done / "bare" / "tiny.yaml", done / "out")
    assert times(done / "out" / "tiny") == before
    assert "tiny: 4 runs, 4 of them already done; 1 at a time." in capsys.readouterr().out


def test_a_damaged_result_is_named_and_done_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = done / "out" / "tiny"
    before, kept = times(folder), results(folder)
    (name,) = (name for name, result in kept.items() if (result["arm"], result["seed"]) == ("N = 2", 1))
    path = folder / "runs" / name
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 1', '"seed": 7', 1), encoding="utf-8")
    start(done / "bare" / "tiny.yaml", done / "out")
    printed = capsys.readouterr().out
    assert f"N = 2, seed 1: {name} is damaged: its content does not match its checksum; it is run again." in printed
    after = times(folder)
    assert {other for other in before if after[other] != before[other]} == {name}
    again = results(folder)[name]
    assert [point["figures"] for point in again["curve"]] == [point["figures"] for point in kept[name]["curve"]]


def test_report_only_draws_again_without_training(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = done / "out" / "tiny"
    before, page = times(folder), folder / "report.html"
    page.unlink()
    run("study", done / "tiny.yaml", "--output", done / "out", "--report_only")
    assert page.is_file()
    assert times(folder) == before
    assert capsys.readouterr().out.startswith("- Accuracy of horizon 1: N = 1 has ")


def test_results_of_another_length_are_named_outdated(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = written(done, name="changing", seeds=1, arms={"only": {}}, figures=[], tables=[], decode=None)
    start(yaml, done / "out")
    yaml = written(done, name="changing", seeds=1, arms={"only": {}}, figures=[], tables=[], decode=None, steps=4)
    capsys.readouterr()
    start(yaml, done / "out")
    printed = capsys.readouterr().out
    assert re.search(r"only, seed 1: \S+\.json is outdated: the study, its length or the package has changed", printed)
    (result,) = results(done / "out" / "changing").values()
    assert result["steps"] == 4


def test_more_seeds_keep_those_that_are_there(done: Path) -> None:
    folder = done / "out" / "tiny"
    before = times(folder)
    start(done / "bare" / "tiny.yaml", done / "out", "--seeds", "3")
    after = times(folder)
    assert len(after) == 6
    assert before.items() <= after.items()


def test_an_arm_uses_the_model_of_its_helper(done: Path) -> None:
    def trunk(helper: str) -> dict[str, object]:
        return {"class_path": "tests.unit.studies.tiny.trained_trunk", "init_args": {"ckpt_path": {"helper": helper}}}

    arms = {"plain": {}, "taught": {"model.trunk": trunk("teacher")}, "briefly": {"model.trunk": trunk("short")}}
    helpers = {"teacher": {"share": 3}, "short": {"share": 0.5}}  # differ in their lengths alone
    yaml = written(done, name="taught", arms=arms, helpers=helpers, seeds=1, points=1, figures=[], tables=[])
    start(yaml, done / "out")
    found = {result["arm"]: result for result in results(done / "out" / "taught").values()}
    steps = {"teacher": 24, "short": 4, "plain": 8, "taught": 8, "briefly": 8}
    assert {name: result["steps"] for name, result in found.items()} == steps
    # It goes on from where the helper ended, and the helper's operations are its own.
    assert found["taught"]["final"]["loss/head_1"] < found["plain"]["final"]["loss/head_1"]
    assert found["taught"]["final"]["flops"] == found["plain"]["final"]["flops"] + found["teacher"]["final"]["flops"]
    page = (done / "out" / "taught" / "report.html").read_text(encoding="utf-8")
    assert "taught" in page


def test_a_budget_shortens_all_runs_alike(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = written(done, name="long", steps=10**6, seeds=1, points=1, figures=[], tables=[], decode=None)
    start(yaml, done / "out", "--budget", "0.05")
    assert "lengths scaled to" in capsys.readouterr().out
    first, second = results(done / "out" / "long").values()
    assert 1 < first["steps"] == second["steps"] < 10**5
    assert "--budget 0.05" in (done / "out" / "long" / "report.html").read_text(encoding="utf-8")


def test_a_failing_run_does_not_take_the_others_along(done: Path) -> None:
    optimizer = {"class_path": "SGD", "init_args": {"lr": 1e30}}
    arms = {"good": {}, "wild": {"model.optimizer": optimizer, "trainer.gradient_clip_val": None}}
    yaml = written(done, name="wild", arms=arms, steps=60, seeds=1, figures=[], tables=[], verdicts=[], decode=None)
    with pytest.raises(SystemExit) as stopped:
        start(yaml, done / "out")
    assert re.match(
        r"error: study: 1 of the runs failed and are missing; the first, wild, seed 1: .*the loss is nan at step 2",
        str(stopped.value.code),
    )
    page = (done / "out" / "wild" / "report.html").read_text(encoding="utf-8")
    assert "No results: wild, seed 1." in page


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown": (["ntebook"], "study: there is no study 'ntebook'. Known: "),
    "seeds": (["{}", "--seeds", "0"], "study: seeds must be at least 1, got 0."),
    "workers": (["{}", "--workers", "0"], "study: workers must be at least 1, got 0."),
    "budget": (["{}", "--budget", "-1"], "study: budget must be above 0 minutes, got -1."),
    "nothing": (
        ["{}", "--report_only", "--output", "gone"],
        "study: gone/tiny holds no results of 'tiny'; run it once",
    ),
    "argument": (
        ["{}", "--budgt", "1"],
        "unknown argument 'budgt'; did you mean budget? Known: name, seeds, budget, output, workers, report",
    ),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(done: Path, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    given = [argument.replace("{}", "tiny.yaml") for argument in arguments]
    assert refusal("study", *given).startswith(sentence)


def test_a_budget_too_small_is_refused_with_one_that_would_do(done: Path) -> None:
    sentence = refusal("study", done / "tiny.yaml", "--output", done / "out", "--budget", "0.001", "--workers", "1")
    assert re.fullmatch(
        r"study: a budget of 0.001 minutes is too small for one step of each of the 4 runs of 'tiny', 1 at a time; "
        r"allow [\d.]+ minutes, or use fewer --seeds\.",
        sentence,
    )


def test_a_class_that_is_not_there_is_refused_before_any_run(done: Path) -> None:
    yaml = written(done, name="typo", arms={"a": {"model.heads.class_path": "LinaerHeads"}})
    said = refusal("study", yaml, "--output", done / "out", "--workers", "1")
    named = r"arm 'a': model\.heads: unknown class 'LinaerHeads'; did you mean LinearHeads\? Known: .*, LinearHeads,"
    assert re.match(named, said)
    assert not (done / "out" / "typo" / "runs").exists()


def test_without_a_name_it_lists_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    run("study")
    printed = capsys.readouterr().out
    assert {"notebook", "notebook_samples", "code"} <= set(re.findall(r"\w+", printed))
    assert "Does predicting several numbers" in " ".join(printed.split())


def _is_gone(group: int) -> bool:
    """Wait until nobody is left of a process group; the server that workers are forked from ends by itself."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


ENDLESS = {"seeds": 1, "points": 1, "figures": [], "tables": [], "verdicts": [], "decode": None}


def goes_on(folder: Path, yaml: Path) -> None:
    """Assert that the same command keeps the run that is done, and does the other, made shorter meanwhile."""
    before = times(folder / "tiny")
    assert len(before) == 1
    written(folder, arms={"short": {}, "endless": {"share": 1}}, **ENDLESS)
    start(yaml, folder)
    after = times(folder / "tiny")
    assert len(after) == 2
    assert before.items() <= after.items()


def test_ctrl_c_stops_it_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = written(tmp_path, arms={"short": {}, "endless": {"share": 10**5}}, **ENDLESS)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it

    def press() -> None:
        while not times(tmp_path / "tiny"):
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        start(yaml, tmp_path)
    thread.join()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("Stopped. Finished runs are kept; the same command resumes the study.\n")
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    goes_on(tmp_path, yaml)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    yaml = written(tmp_path, arms={"short": {}, "endless": {"share": 10**5}}, **ENDLESS)
    process = subprocess.Popen(
        [sys.executable, "-m", "mtp_modules", "study", str(yaml), "--output", str(tmp_path), "--workers", "1"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(b"[1/2] short, seed 1: done"):
                break
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: everybody in the group gets it
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert err.decode() == "Stopped. Finished runs are kept; the same command resumes the study.\n"
    assert _is_gone(process.pid)
    goes_on(tmp_path, yaml)
