"""Every study that comes with the package can be run: its arms learn, and its figures find what they need."""

from itertools import islice
from pathlib import Path

import pytest
import yaml

from mtp_modules.configuration import assemble
from mtp_modules.reports.requests import check_keys, check_requests
from mtp_modules.studies import Study, load_study, shipped
from mtp_modules.studies.cells import Cell
from mtp_modules.studies.evaluation import evaluate
from mtp_modules.training import step_flops
from tests.command_line import ROOT, run


def smaller(cell: Cell) -> Cell:
    """Take the same model, less deep, and less of the same data; of text, only what is at hand."""
    data, trunk = cell.sections["data"], cell.sections["model"]["trunk"]
    if "num_layers" in trunk["init_args"]:
        cell = cell.changed({"model.trunk.init_args.num_layers": 1}, "smaller")
    size = "max_eval_windows" if "sources" in data["init_args"] else "num_val"
    overrides = {"data.init_args.batch_size": 2, f"data.init_args.{size}": 2}
    if "sources" in data["init_args"]:
        overrides["data.init_args.sources"] = [str(ROOT / "mtp_modules")]
    if "num_train" in data["init_args"]:
        overrides["data.init_args.num_train"] = 4
    if "num_workers" in data["init_args"]:
        overrides["data.init_args.num_workers"] = 0
    return cell.changed(overrides, "smaller")


NAMES = [pytest.param(name, marks=pytest.mark.slow) if name.endswith("_gpu") else name for name in sorted(shipped())]
"""What needs a GPU takes long to build, too."""


@pytest.fixture(params=NAMES)
def study(request: pytest.FixtureRequest) -> Study:
    return load_study(request.param)


def test_every_arm_learns_and_gives_what_is_drawn(study: Study, tmp_path: Path) -> None:
    check_requests(study)
    keys: set[str] = set()
    paths: dict[str, str] = {}
    for cell in (*study.helper_cells(), *study.cells()):
        if cell.value != study.sweep_values[-1]:
            continue
        sections = smaller(cell).seeded(1, paths)
        module, data = assemble(sections["model"], sections["data"])
        assert module.lookahead == data.lookahead
        module(next(iter(data.train_dataloader()))).loss.backward()
        assert any(parameter.grad is not None for parameter in module.model.trunk.parameters())
        if cell.is_helper:
            paths[cell.arm] = str(tmp_path / cell.arm)
            module.model.save_pretrained(paths[cell.arm])
            continue
        data.setup("validate")
        keys |= set(evaluate(module, islice(data.val_dataloader(), 1)).figures)
        assert step_flops(module, batch_size=2, length=16) > 0
    for overrides in study.cells()[0].tests.values():
        sections = smaller(study.cells()[0].changed(overrides, "test")).seeded(1, paths)
        module, data = assemble(sections["model"], sections["data"])
        assert evaluate(module, islice(data.val_dataloader(), 1)).figures.keys() <= keys
    check_keys(study, keys)


@pytest.mark.slow
def test_a_study_with_a_teacher_and_tests_is_drawn(tmp_path: Path) -> None:
    asked = {
        "question": "Who learns to add?",
        "claim": "The one with a teacher.",
        "base": {
            "model": {
                "trunk": {"class_path": "RecurrentTrunk", "init_args": {"vocab_size": 9, "d_model": 8}},
                "heads": {"class_path": "LinearHeads", "init_args": {"num_horizons": 1}},
                "loss": {"class_path": "MultiTokenLoss"},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
            },
            "data": {
                "class_path": "TaskDataModule",
                "init_args": {
                    "task": {
                        "class_path": "PolynomialTask",
                        "init_args": {"modulus": 3, "num_coefficients": 2, "max_operations": 2},
                    },
                    "batch_size": 4,
                    "num_val": 8,
                },
            },
        },
        "steps": 60,
        "points": 2,
        "seeds": 1,
        "helpers": {"teacher": {"model.trunk.init_args.d_model": 12, "share": 0.1}},
        "arms": {
            "plain": {},
            "taught": {
                "match": "flops",
                "model.teacher": {"class_path": "TeacherModel", "init_args": {"ckpt_path": {"helper": "teacher"}}},
            },
        },
        "tests": {str(m): {"data.init_args.task.init_args.max_operations": m} for m in (1, 3)},
        "figures": [{"kind": "tests", "x": "operations", "trained": 1}],
        "tables": [{"kind": "results", "columns": ["steps", "flops", "3: answer/exact"], "changes": True}],
    }
    path = tmp_path / "adders.yaml"
    path.write_text(yaml.safe_dump(asked), encoding="utf-8")
    run("study", path, "--output", tmp_path / "runs", "--workers", "1")
    folder = tmp_path / "runs/adders"
    assert (folder / "figures/1-tests.png").stat().st_size > 5000
    table = folder / "tables/1-results.csv"
    head, plain, taught = (line.split(",") for line in table.read_text(encoding="utf-8").splitlines())
    assert head[:2] == ["arm", "changed lines"]
    assert (plain[:2], taught[:2]) == (["plain", "0"], ["taught", "6"])  # one of them the helper's
    steps, flops = head.index("optimizer steps"), head.index("training FLOPs")
    assert float(taught[steps]) < float(plain[steps]) == 60
    one = float(plain[flops]) / 60
    assert float(taught[flops]) == pytest.approx(float(plain[flops]), abs=4 * one)
