"""What a study's YAML may say, and the sentences about what it may not."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_modules.reports.requests import check_keys, check_requests
from mtp_modules.studies import load_study, shipped
from tests.unit.studies.tiny import study, written

EVERY_KEY = {f"{name}/head_{h}" for name in ("loss", "bits", "accuracy", "perplexity") for h in range(1, 9)}


def test_each_makes_every_combination() -> None:
    arms = {
        "{num_horizons} heads, {optimizer}": {
            "model.heads.init_args.num_horizons": {"each": [1, 3]},
            "model.optimizer": {"each": {"adam": {"class_path": "Adam"}, "sgd": {"class_path": "SGD"}}},
        }
    }
    cells = study(arms=arms).cells()
    assert [cell.arm for cell in cells] == ["1 heads, adam", "1 heads, sgd", "3 heads, adam", "3 heads, sgd"]
    assert cells[-1].sections["model"]["optimizer"] == {"class_path": "SGD"}
    assert cells[-1].sections["model"]["heads"]["init_args"]["num_horizons"] == 3


def test_a_sweep_multiplies_the_arms() -> None:
    cells = study(sweep={"key": "data.init_args.num_train", "label": "rows", "values": [8, 64]}).cells()
    assert [cell.label for cell in cells] == ["N = 1 at 8", "N = 1 at 64", "N = 2 at 8", "N = 2 at 64"]
    assert [cell.sections["data"]["init_args"]["num_train"] for cell in cells] == [8, 64, 8, 64]


def test_cells_share_nothing() -> None:
    first, second = study().cells()
    first.sections["model"]["heads"]["init_args"]["num_horizons"] = 99
    assert second.sections["model"]["heads"]["init_args"]["num_horizons"] == 2
    assert study().cells()[0].sections["model"]["heads"]["init_args"]["num_horizons"] == 1


def test_a_run_gets_its_seed_unless_the_study_fixes_the_datas() -> None:
    (cell, _) = study().cells()
    assert cell.seeded(7, {})["data"]["init_args"]["seed"] == 7
    assert cell.changed({"data.init_args.seed": 3}, "test").seeded(7, {})["data"]["init_args"]["seed"] == 3


def test_helpers_are_filled_in() -> None:
    arms = {"plain": {}, "taught": {"model.trunk.init_args": {"ckpt_path": {"helper": "teacher"}}}}
    asked = study(arms=arms, helpers={"teacher": {"share": 0.5}})
    plain, taught = asked.cells()
    assert (plain.needs, taught.needs) == (set(), {"teacher"})
    filled = taught.seeded(1, {"teacher": "here"})["model"]["trunk"]["init_args"]
    assert filled == {"ckpt_path": "here"}
    assert [cell.share for cell in asked.helper_cells()] == [0.5]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "section": ({"arms": {"a": {"modle.x": 1}}}, "arm 'a': cannot set 'modle.x'. Known: model.KEY, data.KEY"),
    "way": ({"arms": {"a": {"model.tie.x": 1}}}, ""),
    "through": (
        {"arms": {"a": {"model.heads.class_path.x": 1}}},
        "arm 'a': cannot set 'model.heads.class_path.x': 'class_path' is 'LinearHeads' in the base, not a mapping.",
    ),
    "match": ({"arms": {"a": {"match": "time"}}}, "arm 'a': match must be one of data, flops, seconds, got 'time'."),
    "trainer": (
        {"arms": {"a": {"trainer.max_steps": 3}}},
        "arm 'a': trainer options of a study are gradient_clip_val, gradient_clip_algorithm, accumulate_grad_batches, ",
    ),
    "each": (
        {"arms": {"a": {"model.heads.init_args.num_horizons": {"each": [1, 2]}}}},
        "arms: 'a' gives model.heads.init_args.num_horizons several values; put {num_horizons} into the name.",
    ),
    "twice": (
        {"arms": {"{x}": {"model.x": {"each": [1, 1]}}}},
        "arms: '1' is defined twice; give each arm another name.",
    ),
    "nothing": ({"arms": {"a": 5}}, "arms: 'a' must be a mapping of keys to values, got 5; {} changes nothing."),
    "no arms": ({"arms": {}}, "tiny: arms is empty; give at least one arm."),
    "steps": ({"steps": 0}, "tiny: steps must be at least 1, got 0."),
    "helper": (
        {"arms": {"a": {"model.x": {"helper": "teacher"}}}},
        "arm 'a': needs helper 'teacher'. Only arms can use helpers; known: none.",
    ),
    "helper's": (
        {"helpers": {"a": {"model.x": {"helper": "b"}}, "b": {}}},
        "arm 'a': needs helper 'b'. Only arms can use helpers; known: a, b.",
    ),
    "both": ({"helpers": {"N = {num_horizons}": {}}}, "tiny: 'N = {num_horizons}' is both an arm and a helper"),
    "test": (
        {"tests": {"far": {"model.x": 1}}},
        "test 'far': can override the data only, got 'model.x'.",
    ),
    "base": ({"base": {"model": {}}}, "tiny: base needs a section 'data', as in the YAML of fit."),
    "base's": (
        {"base": {"model": {}, "data": {}, "loss": {}}},
        "tiny: base has no section 'loss'. Known: model, data,",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG)
def test_what_a_study_refuses(changes: dict[str, Any], sentence: str) -> None:
    if not sentence:
        assert study(**changes).cells()[0].sections["model"]["tie"] == {"x": 1}  # the parser will refuse it by name
        return
    with pytest.raises(ValueError, match=re.escape(sentence)):
        [*study(**changes).cells(), *study(**changes).helper_cells()]


FILES: dict[str, tuple[str, str]] = {
    "unknown": ("nothing: 1", "study: unknown key 'nothing'. Known: question, claim, base, arms, steps, match,"),
    "missing": ("arms: {a: {}}", "study: needs the key 'question'."),
    "number": ("steps: many", "study: steps must be an integer, got 'many'."),
    "truth": ("seeds: true", "study: seeds must be an integer, got True."),
    "list": ("figures: {kind: bars}", "study: figures must be a list, got {'kind': 'bars'}."),
    "choice": ("match: time", "study: match must be one of data, flops, seconds, got 'time'."),
    "either": ("minutes: long", "study: minutes must be a number or null, got 'long'."),
    "nested": (
        "sweep: {key: share, label: x, vals: [1]}",
        "study: unknown key 'sweep.vals'. Known: key, label, values.",
    ),
    "yaml": ("a: [", "is not valid YAML (while parsing a flow"),
    "no mapping": ("- 1", "must be a mapping with question, claim, base, arms and steps, got list."),
}


@pytest.mark.parametrize(("text", "sentence"), FILES.values(), ids=FILES)
def test_what_is_no_study(tmp_path: Path, text: str, sentence: str) -> None:
    path = written(tmp_path)
    if text[0].isalpha() and "needs the key" not in sentence and "YAML" not in sentence:
        kept = yaml.safe_load(path.read_text(encoding="utf-8")) | yaml.safe_load(text)
        text = yaml.safe_dump(kept)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_study(str(path))


def test_a_file_says_the_same_as_the_object(tmp_path: Path) -> None:
    sweep = {"key": "share", "label": "x", "values": [0.5, 1]}
    assert load_study(str(written(tmp_path, minutes=3, sweep=sweep))) == study(minutes=3.0, sweep=sweep)


def test_an_unknown_study_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"there is no study 'ntebook'. Known: code, .*notebook, notebook_samples"):
        load_study("ntebook")


DRAWN: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"figures": [{"kind": "pie"}]}, "there is no figure of kind 'pie'. Known: curves, sweep, bars, heat_map,"),
    "argument": (
        {"figures": [{"kind": "bars", "colour": 1}]},
        "figure 'bars' has no argument 'colour'. Known: metric, title, arms, zoom, value.",
    ),
    "needed": ({"tables": [{"kind": "results"}]}, "table 'results' needs the argument 'columns'."),
    "arm": (
        {"figures": [{"kind": "bars", "arms": ["N = 3"]}]},
        "figure 'bars' names arm 'N = 3'. Known: N = 1, N = 2.",
    ),
    "value": (
        {"figures": [{"kind": "bars", "value": 3}]},
        "tiny: figure 'bars' has no value 3. Values of the sweep: none.",
    ),
    "verdict": ({"verdicts": [{"kind": "data_needed"}]}, "verdict 'data_needed' needs the argument 'arm'."),
}


@pytest.mark.parametrize(("changes", "sentence"), DRAWN.values(), ids=DRAWN)
def test_what_cannot_be_drawn(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_requests(study(**changes))


def test_a_key_that_no_run_gives() -> None:
    with pytest.raises(
        ValueError, match=r"tiny: 'curves' needs 'loss/had_1', which no run produces. Known: .*loss/head_1"
    ):
        check_keys(study(figures=[{"kind": "curves", "y": "loss/had_1"}]), EVERY_KEY)


def test_every_study_of_the_package_asks_for_what_its_runs_give() -> None:
    for name in shipped():
        asked = load_study(name)
        check_requests(asked)
        check_keys(asked, EVERY_KEY | {"accepted_length", "answer/exact", "answer/tokens"})
