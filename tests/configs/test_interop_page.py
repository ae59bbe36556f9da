"""The page about formats: its commands and its Python run as they stand, and its tables are whole."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from mtp_modules.data import ByteTokenizer
from mtp_modules.interop import export_model, files
from mtp_modules.interop.conventions import VALUES
from mtp_modules.interop.exchange import FORMATS, OWN
from tests import interop
from tests.architecture.imports import ROOT
from tests.command_line import run
from tests.interop import stored

PAGE = (ROOT / "docs/interop.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_tables_name_every_format_and_every_convention() -> None:
    measured = re.search(r"^<!-- engines: begin -->$(.*?)^<!-- engines: end -->$", PAGE, re.M | re.S)
    assert measured is not None
    named = re.findall(r"^\| `(\w+)` \|", PAGE.replace(measured[0], ""), re.M)
    assert named == [OWN, *FORMATS, *VALUES]
    assert set(re.findall(r"^\| `(\w+)` \|", measured[1], re.M)) == set(FORMATS) - {"founding_paper"}
    for name, values in VALUES.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*?) \|", PAGE, re.M)
        assert set(re.findall(r"`(\w+)`", row)) == set(values) - {"none"}


def test_the_page_says_what_import_asks_for() -> None:
    several = {f: {k for k, values in FORMATS[f].takes.items() if len(values) > 1} for f in FORMATS}
    asked = {f: keys - FORMATS[f].stated({}).keys() for f, keys in several.items()}
    assert {f: keys for f, keys in asked.items() if keys} == {
        "deepseek": {"chain_state", "position_0"},
        "glm": {"chain_state", "position_0"},
        "mimo": {"position_0"},
    }


def test_the_commands_and_the_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = interop.glm()
    model.save_pretrained("runs/mine")
    export_model(model, "hub_folder", format="glm")
    kept = {n: v for n, v in stored(Path("hub_folder") / files.WEIGHTS).items() if not n.startswith("model.layers.2.")}
    kept = {name: value for name, value in kept.items() if not name.startswith("model.layers.3.")}
    files.write_tensors(Path("hub_folder") / files.WEIGHTS, kept)
    heads = export_model(interop.medusa(), "heads", format="medusa", tokenizer=ByteTokenizer())
    commands = [line for kind, block in CODE if kind == "bash" for line in block.splitlines()]
    served = export_model(interop.qwen(3), "served", format="qwen", tokenizer=ByteTokenizer())
    drafter = export_model(interop.eagle3(num_horizons=4), "drafter", format="eagle3", tokenizer=ByteTokenizer())
    engine = [line for line in commands if line.startswith("vllm ")]
    assert engine == [served.command, heads.command, drafter.command]
    shutil.rmtree("served")
    ours = [shlex.split(line)[3:] for line in commands if line.startswith("python -m mtp_modules ")]
    assert [words[0] for words in ours] == ["export", "import", "generate", "export"]
    for words in ours:
        run(*words)
    assert "\n1 2 3" in capsys.readouterr().out
    assert (Path("hub_folder") / files.INDEX).is_file()
    pushed: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **options: pushed.append(options))
    for kind, block in CODE:
        if kind == "python":
            exec(compile(block, "interop.md", "exec"), {})
    assert [options["repo_id"] for options in pushed] == ["me/mine"]
    read = torch.load("heads/medusa_lm_head.pt", weights_only=True)
    assert read.keys() == stored(Path("heads/medusa_lm_head.safetensors")).keys()
