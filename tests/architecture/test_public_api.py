"""The names that users rely on: they exist, they are documented, and they do not change by accident."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import mtp_modules
import mtp_modules.heads
from tests.architecture.imports import PACKAGE, ROOT, source_files

PUBLIC = {
    "AutoregressiveDecoder",
    "AuxiliaryWeights",
    "ExplicitWeights",
    "GeometricWeights",
    "Heads",
    "HuggingFaceTrunk",
    "MTPModel",
    "MultiTokenLoss",
    "NaiveLinearCrossEntropy",
    "PerHeadMetrics",
    "RecurrentTrunk",
    "SpeculativeDecoder",
    "Tokenizer",
    "TransformerTrunk",
    "Trunk",
    "UniformWeights",
    "build",
    "describe",
    "future_targets",
}
LONGEST_FILE = 330
TEXT_FILES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ""}


def _modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.walk_packages(mtp_modules.__path__, f"{PACKAGE}.")]
    return [mtp_modules, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))]


MODULES = _modules()
EXPORTS = [(module, name) for module in MODULES for name in getattr(module, "__all__", ())]
EXPORT_IDS = [f"{module.__name__}.{name}" for module, name in EXPORTS]


def kinds_of_heads_on_their_page() -> list[str]:
    """Return the classes in the table of the page about heads, one or more rows each."""
    page = (ROOT / "docs/heads.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"^\| `(\w+Heads)\b", page, re.M)))


def test_the_public_names_are_the_golden_ones() -> None:
    assert set(mtp_modules.__all__) == PUBLIC | set(kinds_of_heads_on_their_page())


def test_the_page_about_heads_has_a_row_for_every_kind() -> None:
    assert sorted(kinds_of_heads_on_their_page()) == sorted(mtp_modules.heads.__all__)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_name_is_exported_twice(module: ModuleType) -> None:
    names = list(getattr(module, "__all__", ()))
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("module", "name"), EXPORTS, ids=EXPORT_IDS)
def test_an_exported_name_is_there_and_has_a_docstring(module: ModuleType, name: str) -> None:
    value = getattr(module, name)
    own = getattr(value, "__module__", "").startswith(f"{PACKAGE}.")
    assert own or module.__name__ == f"{PACKAGE}.core.shapes"
    if own:
        assert value.__doc__


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_module_has_a_docstring(module: ModuleType) -> None:
    assert module.__doc__


def test_every_subpackage_says_what_it_exports() -> None:
    silent = [m.__name__ for m in MODULES if hasattr(m, "__path__") and not hasattr(m, "__all__")]
    assert silent == [f"{PACKAGE}.commands"]  # the command line's own


def test_every_subpackage_has_its_page_in_the_reference() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    shown = set(re.findall(rf"^::: ({PACKAGE}[\w.]*)$", pages, flags=re.MULTILINE))
    for module, name in EXPORTS:
        origin = inspect.getmodule(getattr(module, name))
        homes = {module.__name__, origin.__name__ if origin else ""}
        if module is not mtp_modules and module.__name__ != f"{PACKAGE}.core.shapes":
            assert homes & shown, f"{module.__name__}.{name} is on no page of docs/reference"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_stays_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def _tracked_text() -> list[Path]:
    folders = ("mtp_modules", "configs", "tests", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return [path for path in files if path.suffix in TEXT_FILES and "__pycache__" not in path.parts]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    places = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work|mnt|tmp)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _tracked_text()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if places.search(line)
    ]
    assert found == []
