"""The commands and the Python of the page about acceptance run as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from mtp_modules import MTPModel, RecurrentHeads, RecurrentTrunk
from mtp_modules.data.tokenizers import ByteTokenizer
from tests.command_line import ROOT, run

PAGE = (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("python -m mtp_modules ")
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
    for line in block.splitlines()
]
FEWER = "--rows 8 --prompts 2 --prompt_length 8 --new_tokens 4 --every 64"


@pytest.fixture(scope="module")
def model() -> MTPModel:
    torch.manual_seed(0)
    trunk, heads = RecurrentTrunk(vocab_size=256, d_model=8), RecurrentHeads(d_model=8, num_horizons=3)
    return MTPModel(trunk=trunk, heads=heads).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: MTPModel) -> Path:
    """Return a folder with what the page speaks of: a run that left its configuration, and text."""
    folder = tmp_path_factory.mktemp("page")
    model.save_pretrained(folder / "runs" / "quickstart", tokenizer=ByteTokenizer())
    (folder / "my_text").mkdir()
    for name in "abcdefghijkl":
        (folder / "my_text" / f"{name}.py").write_text(f"{name} = [1, 2]\n" * 60, encoding="utf-8")
    text = {"sources": ["my_text"], "window": 64, "batch_size": 4, "val_share": 0.3, "test_share": 0.3}
    config = {"data": {"class_path": "TextDataModule", "init_args": text}, "trainer": {"max_steps": 3}}
    (folder / "runs" / "quickstart" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def test_the_page_has_commands() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["diagnose", "diagnose", "diagnose", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(folder)
    run(*shlex.split(command), *shlex.split(FEWER if command.startswith("diagnose") else "--max_new_tokens 8"))
    printed = capsys.readouterr().out
    for written in re.findall(r"--(?:html|json|output) (\S+)", command):
        assert (folder / written).stat().st_size > 1000
    assert ("Drafts by depth" in printed) == command.startswith("diagnose")


def test_the_python_of_the_page_runs(model: MTPModel, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    tokens = torch.randint(1, 256, (2, 20))
    names = {"model": model, "batches": [{"tokens": tokens}], "prompts": [[1, 2, 3]], "tokenizer": ByteTokenizer()}
    exec(compile(code, "diagnosis.md", "exec"), names)
    assert re.fullmatch(r"[0-2] \[[01]\.\d+, [01]\.\d+\]\n", capsys.readouterr().out)
