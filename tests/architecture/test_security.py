"""Whatever loads, imports by name, runs code, starts a process or opens a connection is in a table, with its reason."""

import ast

import pytest

from tests.architecture.imports import PACKAGE, ROOT, source_files

CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.hub", "torch.jit.load", "np.load", "np.fromfile"),
    *("np.memmap", "yaml.load", "yaml.safe_load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads"),
    *("pickle._Unpickler", "pickle.Unpickler", "importlib.import_module", "torch.from_file", "safe_open", "load_file"),
    *(
        "os.system",
        "os.popen",
        "get_loader",
        "set_loader",
        "safetensors.torch.load_model",
        "shelve.open",
        "marshal.loads",
        "torch.compile",
    ),
    *(
        "runpy.run_path",
        "runpy.run_module",
        "importlib.util.spec_from_file_location",
        "ctypes.CDLL",
        "add_safe_globals",
    ),
}
MODULES = {
    *("subprocess", "socket", "urllib", "http", "requests", "httpx", "ftplib", "ssl", "asyncio", "multiprocessing"),
    *("ctypes", "marshal", "shelve", "runpy", "huggingface_hub", "transformers", "tokenizers", "fsspec", "webbrowser"),
    *("datasets", "litdata"),
}
LOADS = {"AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained", "AutoModelForCausalLM.from_pretrained"}

ALLOWED: dict[str, dict[str, str]] = {
    "configuration/assembly.py": {"importlib.import_module": "classes that a configuration names: it is a program"},
    "configuration/parser.py": {"importlib.import_module": "classes that a configuration names: it is a program"},
    "core/component.py": {"importlib.import_module": "build: trusted packages only"},
    "core/pickles.py": {
        "torch.load": "weights only, after the check",
        "pickle._Unpickler": "its find_class gives stand-ins only",
    },
    "__init__.py": {"importlib.import_module": "this package's own modules, of a fixed table"},
    "core/saving.py": {
        "ctypes": "renameat2, which exchanges two names in one step",
        "ctypes.CDLL": "the C library",
    },
    "training/signals.py": {"subprocess": "scontrol, which requeues a SLURM job"},
    "data/__init__.py": {"importlib.import_module": "this package's own modules, of a fixed table"},
    "data/huggingface.py": {
        "transformers": "reads a tokenizer that the user names",
        "tokenizers": "parses the content of a tokenizer, which is no code",
        "AutoTokenizer.from_pretrained": "trust_remote_code is false; refused where a file names it",
    },
    "data/sources/tables.py": {"datasets": "reads tables and data sets that the user names; runs no code of theirs"},
    "commands/running.py": {"importlib.import_module": "this package's own commands, of a fixed table"},
    "commands/held_out.py": {"get_loader": "a run's own configuration: this package's classes only"},
    "configuration/yaml_text.py": {
        "get_loader": "bounded by parse_yaml",
        "set_loader": "puts parse_yaml in its place",
    },
    "interop/files.py": {"load_file": "safetensors"},
    "pretrained.py": {"safe_open": "safetensors", "safetensors.torch.load_model": "safetensors"},
    "model.py": {
        "huggingface_hub": "push_to_hub, which a user calls",
    },
    "studies/pool.py": {
        "multiprocessing": "the runs of a study, in processes of its own",
        "multiprocessing.connection": "waits for them",
    },
    "training/cached_states.py": {"torch.from_file": "numbers, as long as the index and the configuration say"},
    "trunks/huggingface_cache.py": {
        "transformers.cache_utils": "base classes",
        "transformers.integrations.sdpa_attention": "a function",
        "transformers.masking_utils": "a function",
        "transformers.modeling_utils": "a registry of functions",
    },
    "trunks/huggingface_loading.py": {
        "transformers": "builds a model that the user names, or a configuration without names",
        "AutoConfig.from_pretrained": "trust_remote_code is false; refused where a file names it",
        "AutoModelForCausalLM.from_pretrained": "trust_remote_code is false, safetensors only; refused as above",
    },
    "data/streamed.py": {"litdata": "reads tokens at a place that the user names"},
    "data/sharded_array.py": {"np.memmap": "integers only, as many as the files have"},
    "data/token_files.py": {"np.memmap": "integers only, and no more than the file has"},
    "decoders/graphs/inductor.py": {"torch.compile": "compiles this package's own functions"},
}


def uses(source: str) -> set[str]:
    """Return what a module calls or imports of the tables above."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            name = node.module
            found |= {name} if name.split(".")[0] in MODULES else set()
            found |= {f"{name}.{alias.name}" for alias in node.names} & CALLS
            found |= {alias.name for alias in node.names} & (CALLS - {"compile"})
        elif isinstance(node, ast.Call | ast.ClassDef):
            called = [node.func] if isinstance(node, ast.Call) else node.bases
            for name in map(ast.unparse, called):
                found |= {call for call in CALLS | LOADS if name == call or ("." in call and name.endswith(f".{call}"))}
        elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in CALLS:
            found.add(name)
    return found


def test_every_load_and_import_is_named_with_its_reason() -> None:
    files = {path.relative_to(ROOT / PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in source_files()}
    found = {name: here for name, source in files.items() if (here := uses(source))}
    assert found == {name: set(reasons) for name, reasons in ALLOWED.items()}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "load = torch.load",
        "from torch import hub\nx = torch.hub",
        "from importlib import import_module",
        "import subprocess",
        "import urllib.request",
        "from pickle import loads as read\nimport pickle\npickle.loads(x)",
        "class Mine(pickle._Unpickler): ...",
        "def f():\n    import socket",
        "eval('1')",
        "yaml.load(text, Loader=yaml.Loader)",
        "transformers.AutoConfig.from_pretrained(x)",
    ],
)
def test_the_check_finds_them(source: str) -> None:
    assert uses(source)


def test_the_check_finds_nothing_else() -> None:
    assert not uses("import re\nre.compile(x)\nmodel.eval()\njson.loads(x)\nblock.compile()\nmodel.load_state_dict(s)")
