"""Torch's private parts are in one file."""

import ast

from tests.architecture.imports import PACKAGE, ROOT, source_files

HOME = "decoders/graphs/inductor.py"


def private_parts(source: str) -> list[str]:
    """Return the names with an underscore that a module takes from torch, but for those of operators."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            name = ast.unparse(node)
            if isinstance(base, ast.Name) and base.id == "torch" and not name.startswith("torch.ops."):
                found.append(name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{node.module}: {name}" for name in names if name.startswith("_") and name != "__future__"]
    return found


def test_private_parts_of_torch_are_in_one_file() -> None:
    files = {str(path.relative_to(ROOT / PACKAGE)): path for path in source_files()}
    found = {name: parts for name, path in files.items() if (parts := private_parts(path.read_text(encoding="utf-8")))}
    assert list(found) == [HOME], found


def test_the_check_finds_them() -> None:
    for source in (
        "torch._dynamo.mark(x)",
        "from torch._inductor import config",
        "from torch.utils._python_dispatch import _modes",
        "import torch\nx = torch.utils._pytree.tree_map",
    ):
        assert private_parts(source)
    assert not private_parts("import torch\ntorch.compile(f)\nself._dynamo = 1\ntorch.ops._c10d_functional.all_reduce")
