"""Dependencies point one way: core at the bottom, the command line on top."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mtp_modules.data import HuggingFaceTokenizer
from mtp_modules.trunks import HuggingFaceTrunk
from tests.architecture.imports import (
    FILES,
    PACKAGE,
    PACKAGES,
    ROOT,
    UNITS,
    names_imported_early,
    source_files,
    violations,
)


def test_a_file_imports_only_what_its_unit_may() -> None:
    files = {path.relative_to(ROOT / PACKAGE): path.read_text(encoding="utf-8") for path in source_files()}
    assert len(files) > 100
    assert [found for path, source in files.items() for found in violations(source, path)] == []


def test_every_unit_of_the_table_exists_and_has_both_rows() -> None:
    units = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for path in source_files()}
    assert units == set(UNITS) == set(PACKAGES)


def test_units_depend_on_one_another_in_one_direction() -> None:
    done: set[str] = set()
    while remaining := set(UNITS) - done:
        ready = {unit for unit in remaining if UNITS[unit] <= done}
        assert ready, f"{sorted(remaining)} depend on one another"
        done |= ready


@pytest.mark.parametrize(
    ("path", "source", "forbidden"),
    [
        ("core/targets.py", "from mtp_modules.layers import RMSNorm", "mtp_modules.layers.RMSNorm"),
        ("losses/weights.py", "import numpy as np", "numpy"),
        ("losses/weights.py", "from mtp_modules.decoders.loop import greedy_rounds", "mtp_modules.decoders.loop"),
        ("losses/weights.py", "from ..decoders import loop", "mtp_modules.decoders.loop"),
        ("heads/linear.py", "from mtp_modules import trunks", "mtp_modules.trunks"),
        ("heads/linear.py", "from mtp_modules import MTPModel", "mtp_modules.MTPModel"),
        ("heads/linear.py", "import mtp_modules", "mtp_modules"),
        ("decoders/loop.py", "def f():\n    from lightning.pytorch import Trainer", "lightning.pytorch.Trainer"),
        ("losses/weights.py", "import torchmetrics.functional", "torchmetrics.functional"),
        ("trunks/transformer.py", "import transformers", "transformers"),
        ("trunks/huggingface.py", "import transformers", "transformers"),
        ("data/tokenizers.py", "from tokenizers import Tokenizer", "tokenizers.Tokenizer"),
        ("training/module.py", "from mtp_modules.decoders import Decoder", "mtp_modules.decoders.Decoder"),
        ("elsewhere/module.py", "", "'elsewhere' has no row"),
    ],
)
def test_the_check_finds_a_forbidden_import(path: str, source: str, forbidden: str) -> None:
    (found,) = violations(source, Path(path))
    assert forbidden in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/targets.py", "import math\nfrom collections.abc import Sequence\nimport torch.nn.functional as F"),
        ("heads/linear.py", "from mtp_modules.layers.cache import KeyValueState\nfrom .common import check_num_drafts"),
        ("commands/trainer.py", "from mtp_modules import data, heads\nfrom mtp_modules.training import MTPModule"),
    ],
)
def test_the_check_lets_a_permitted_import_pass(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []


MODEL = re.compile(r"lightning_module|\bpl_module\b|\bMTPModule\b(?!`)|import .*\b(Trunk|Heads|MTPModel)\b|core\.trunk")
DATA = sorted((ROOT / PACKAGE / "data").glob("*.py"))


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_data_does_not_reach_for_the_model(path: Path) -> None:
    """It is given numbers, and rows what a trunk has read; docstrings may refer to the module that gives them."""
    assert MODEL.findall(path.read_text(encoding="utf-8")) == []


DISTRIBUTIONS = {"yaml": "pyyaml"}


def test_whatever_is_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[\[<>=!~; ]", requirement)[0]
        for requirement in [
            *project["dependencies"],
            *extras["studies"],
            *extras["hf"],
            *extras["hub"],
            *extras["data"],
            *extras["litdata"],
        ]
    }
    names = set().union(*PACKAGES.values(), *FILES.values())
    assert {DISTRIBUTIONS.get(name, name) for name in names} <= declared


def test_every_dependency_has_one_lowest_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {*project["dependencies"], *chain(*project["optional-dependencies"].values())}
    outside = [Requirement(text) for text in requirements if Requirement(text).name != project["name"]]
    for requirement in outside:
        assert [part.operator for part in requirement.specifier].count(">=") == 1, requirement
    names = [requirement.name for requirement in outside]
    assert sorted(names) == sorted(set(names)), "a package with two ranges: let one extra name the other"


def test_only_reports_need_the_extra() -> None:
    assert {unit for unit, packages in PACKAGES.items() if "matplotlib" in packages} == {"reports"}


def test_only_pushing_needs_the_hub() -> None:
    assert {unit for unit, packages in PACKAGES.items() if "huggingface_hub" in packages} == {"model"}


def test_the_package_is_usable_without_lightning() -> None:
    heavy = {"lightning", "pytorch_lightning", "jsonargparse", "tensorboard"}
    code = f"import sys, {PACKAGE}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    end = "install mtp_modules with the extra hf: pip install -e '.[hf]'."
    with pytest.raises(ValueError, match="^" + re.escape(f"HuggingFaceTrunk: needs the package transformers; {end}")):
        HuggingFaceTrunk(config={"model_type": "llama"})
    both = f"HuggingFaceTokenizer: needs the packages transformers and tokenizers; {end}"
    with pytest.raises(ValueError, match="^" + re.escape(both)):
        HuggingFaceTokenizer(tokenizer_json="{}")


CACHE = f"{PACKAGE}.trunks.huggingface_cache"


def test_the_extra_is_imported_late() -> None:
    """Only the cache, whose classes are those of transformers, does so at its top; nobody imports it there."""
    early = {
        str(path.relative_to(ROOT / PACKAGE)): names
        for path in source_files()
        if (names := names_imported_early(path.read_text(encoding="utf-8")) & {"transformers", "tokenizers", CACHE})
    }
    assert early == {"trunks/huggingface_cache.py": {"transformers"}}
