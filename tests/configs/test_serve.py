"""The configurations that end in an engine: fit, then export, with a small model in the place of SmolLM2."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_modules import MTPModel
from mtp_modules.interop import import_model
from mtp_modules.loading import load_model
from tests.command_line import ROOT, run
from tests.helpers import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def smaller(name: str, small: Path) -> Path:
    """Write a shipped configuration with other places and smaller sizes, and nothing else changed."""
    given: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    data = given["data"]["init_args"]
    data |= {"sources": [str(ROOT / "mtp_modules")], "window": 64, "max_eval_windows": 2}
    if "cached_states" in data:
        trunk = given["model"]["trunk"]["init_args"]
        for owner in (trunk, data["tokenizer"]["init_args"]):
            owner["pretrained"] = str(small)
            del owner["gguf_file"]
        trunk["feature_layers"] = [0, 1, 2]
        given["model"]["num_draft_tokens"] = 64
        heads = given["model"]["heads"]["init_args"]
        while "heads" in heads:
            heads = heads["heads"]["init_args"]
        heads |= {"num_heads": 4, "num_kv_heads": 2}
        data["cached_states"]["init_args"] = {"folder": str(small / f"{name}_states"), "max_windows": 12}
    path = small / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "format"), [("serve_qwen", "qwen"), ("retrofit_eagle3", "eagle3"), ("retrofit_dspark", "dspark")]
)
def test_two_commands_make_a_folder_that_an_engine_serves(
    name: str, format: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu")
    run("fit", "--config", smaller(name, small), *few, "--trainer.log_every_n_steps=1")
    capsys.readouterr()
    lines = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    words = next(line for line in lines if f"export {format}" in line).removeprefix("#   python -m mtp_modules ")
    run(*shlex.split(words))
    last = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Next: "))
    assert last[:2] == ["vllm", "serve"]
    assert (Path(last[2]) / "config.json").is_file()
    model: MTPModel = load_model(f"runs/{name}")[0]
    back = import_model("served", format=format, trunk=None if format == "qwen" else model)
    assert_same(back.state_dict(), model.state_dict())
