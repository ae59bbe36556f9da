"""Who may import whom, read from the source by its syntax tree."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "mtp_modules"
ROOT = Path(__file__).parents[2]

PARTS = (
    "layers",
    "trunks",
    "heads",
    "losses",
    "objectives",
    "decoders",
    "metrics",
    "data",
    "model",
    "loading",
    "training",
    "interop",
)
SHELL = ("configuration", "studies", "reports", "commands", "cli")

# Each unit (subpackage, or module of the top level): the units, and the packages, that it may import besides itself.
UNITS: dict[str, set[str]] = {
    "core": set(),
    "layers": {"core"},
    "trunks": {"core", "layers"},
    "heads": {"core", "layers"},
    "losses": {"core"},
    "objectives": {"core", "losses"},
    "decoders": {"core"},
    "metrics": {"core"},
    "data": {"core"},
    "pretrained": {"core"},
    "model": {"core", "pretrained", "trunks"},  # from_hugging_face
    "loading": {"core", "model", "pretrained"},
    "training": {"core", "layers", "trunks", "heads", "losses", "metrics", "data", "model", "loading", "pretrained"},
    "interop": {"core", "layers", "trunks", "heads", "model"},
    "configuration": {"core", *PARTS},
    "studies": {"core", *PARTS, "configuration", "__init__"},
    "reports": {"core", *PARTS, "configuration", "studies"},
    "commands": {"core", *PARTS, "configuration", "studies", "reports", "__init__"},
    "cli": {"commands"},
    "threads": set(),
    "__main__": {"cli", "commands", "threads"},
    "__init__": {"core", "layers", "trunks", "heads", "losses", "decoders", "metrics", "model", "loading"},
}
# Single files that may import more: the doors to Hugging Face, opened only when somebody goes through.
FILES: dict[str, set[str]] = {
    "trunks/huggingface_loading.py": {"transformers"},
    "trunks/huggingface_cache.py": {"transformers"},
    "data/huggingface.py": {"transformers", "tokenizers"},
    "data/sources/tables.py": {"datasets"},
    "data/streamed.py": {"litdata"},
}
PACKAGES: dict[str, set[str]] = {
    "core": {"torch", "numpy", "jaxtyping"},
    "layers": {"torch"},
    "trunks": {"torch"},
    "heads": {"torch"},
    "losses": {"torch"},
    "objectives": {"torch"},
    "decoders": {"torch", "numpy"},
    "metrics": {"torch", "torchmetrics"},
    "data": {"torch", "numpy", "lightning"},
    "pretrained": {"torch", "safetensors"},
    "model": {"torch", "huggingface_hub"},
    "loading": {"torch"},
    "training": {"torch", "numpy", "lightning", "torchmetrics", "safetensors", "rich"},
    "interop": {"torch", "safetensors"},
    "configuration": {"torch", "lightning", "jsonargparse", "yaml"},
    "studies": {"torch", "lightning", "jsonargparse", "rich", "yaml"},
    "reports": {"torch", "numpy", "lightning", "rich", "matplotlib", "yaml"},
    "commands": {"torch", "numpy", "lightning", "jsonargparse", "rich"},
    "cli": set(),
    "threads": set(),
    "__main__": set(),
    "__init__": set(),
}


def source_files() -> list[Path]:
    """Return every file of the package."""
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def imported(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, those inside functions too.

    Args:
        source: Text of a module.
        package: The package that relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def names_imported_early(source: str) -> set[str]:
    """Return what is imported when a module is: of other packages the top name, of this one the module.

    Args:
        source: Text of a module.
    """
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module if node.module.startswith(PACKAGE) else node.module.split(".")[0])
    return found


def violations(source: str, path: Path) -> list[str]:
    """Return what a file imports and must not.

    Args:
        source: Its text.
        path: Where it lies (or would lie) below the package's folder.
    """
    unit = path.parts[0].removesuffix(".py")
    if unit not in UNITS:
        return [f"{path}: {unit!r} has no row in the table of who may import whom"]
    packages = PACKAGES[unit] | FILES.get(path.as_posix(), set())
    found = []
    for line, name in imported(source, (PACKAGE, *path.parent.parts)):
        top, *rest = name.split(".")
        if top == PACKAGE:
            other = rest[0] if rest and rest[0] in UNITS else "__init__"
            allowed = other == unit or other in UNITS[unit]
        else:
            allowed = top in sys.stdlib_module_names or top in packages
        if not allowed:
            found.append(f"{path}:{line}: {unit} must not import {name}")
    return found
