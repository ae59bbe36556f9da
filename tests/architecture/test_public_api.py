"""The names that users rely on: they exist, they are documented, and they do not change by accident."""

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

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
    "load_model",
    "multi_token_loss",
}
LONGEST_FILE = 330
TEXT_FILES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ""}


def _modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.walk_packages(mtp_modules.__path__, f"{PACKAGE}.")]
    return [mtp_modules, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))]


MODULES = _modules()
EXPORTS = [(module, name) for module in MODULES for name in getattr(module, "__all__", ())]


def bad_exports(module: ModuleType) -> list[str]:
    """Return what is wrong with the names that a module exports."""
    names = list(getattr(module, "__all__", ()))
    found = [f"{name} is exported {count} times" for name, count in Counter(names).items() if count > 1]
    for name in names:
        value = getattr(module, name, None)
        own = getattr(value, "__module__", "").startswith(f"{PACKAGE}.")
        if not hasattr(module, name):
            found.append(f"{name} is not there")
        elif not own and module.__name__ != f"{PACKAGE}.core.shapes":
            found.append(f"{name} is not of this package")
        elif own and not value.__doc__:
            found.append(f"{name} has no docstring")
    return [f"{module.__name__}: {problem}" for problem in found]


def kinds_of_heads_on_their_page() -> list[str]:
    """Return the classes in the table of the page about heads, one or more rows each."""
    page = (ROOT / "docs/heads.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"^\| `(\w+Heads)\b", page, re.M)))


def test_the_public_names_are_the_golden_ones() -> None:
    assert set(mtp_modules.__all__) == PUBLIC | set(kinds_of_heads_on_their_page())


def test_the_page_about_heads_has_a_row_for_every_kind() -> None:
    assert sorted(kinds_of_heads_on_their_page()) == sorted(mtp_modules.heads.__all__)


def test_an_exported_name_is_there_once_and_has_a_docstring() -> None:
    assert [problem for module in MODULES for problem in bad_exports(module)] == []


def test_the_check_finds_bad_exports() -> None:
    module = ModuleType(f"{PACKAGE}.bad")
    module.__all__ = ["missing", "path", "silent", "silent"]
    module.path = Path
    module.silent = type("silent", (), {"__module__": module.__name__})
    problems = ["silent is exported 2 times", "missing is not there", "path is not of this package"]
    assert bad_exports(module) == [
        f"{PACKAGE}.bad: {problem}" for problem in [*problems, *["silent has no docstring"] * 2]
    ]


def test_every_module_has_a_docstring() -> None:
    assert [module.__name__ for module in MODULES if not module.__doc__] == []


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


def test_a_file_stays_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def _tracked_text() -> list[Path]:
    folders = ("mtp_modules", "configs", "tests", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a worktree has such a file
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
