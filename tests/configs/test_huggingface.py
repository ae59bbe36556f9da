"""From a model of transformers in a folder to trained heads and generated text, by the command line."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml

from mtp_modules import AutoregressiveDecoder
from mtp_modules.loading import load_model
from mtp_modules.trunks import HuggingFaceTrunk
from tests.command_line import ROOT, run
from tests.huggingface import save_model, save_tokenizer


def test_heads_are_trained_on_a_frozen_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs"
    own = save_model("llama_tied", theirs, seed=3)
    save_tokenizer(theirs)
    for index in range(12):
        (tmp_path / f"text_{index}.txt").write_text("abc ab cca\n" * 20, encoding="utf-8")
    page = (ROOT / "docs/trunks.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    config = yaml.safe_load(shown.replace("HuggingFaceTB/SmolLM2-135M", str(theirs)))
    config["model"]["trunk"]["init_args"]["max_positions"] = 32
    config["data"]["init_args"] |= {"sources": [str(tmp_path / "text_*.txt")], "window": 16}
    config["data"]["init_args"] |= {"val_share": 0.25, "test_share": 0.25}
    config["trainer"] = {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    config["trainer"] |= {"enable_model_summary": False, "default_root_dir": str(tmp_path / "run")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run("fit", "--config", path)
    (checkpoint,) = (tmp_path / "run").rglob("last.ckpt")
    model, tokenizer = load_model(str(checkpoint))
    assert isinstance(model.trunk, HuggingFaceTrunk)
    assert tokenizer is not None
    trained = dict(own.base_model.named_parameters())
    for name, parameter in model.trunk.model.named_parameters():
        assert torch.equal(parameter, trained[name])
    assert model.unembedding.weight is model.trunk.embedding.weight
    model.save_pretrained(tmp_path / "ours", tokenizer=tokenizer)
    for file in theirs.iterdir():
        file.unlink()
    capsys.readouterr()
    run("generate", "--ckpt_path", tmp_path / "ours", "--prompt", "abc", "--max_new_tokens", "5")
    prompt = tokenizer.encode("abc")
    tokens = AutoregressiveDecoder().generate(model, [prompt], max_new_tokens=5).tokens[0]
    until_end = list(itertools.takewhile(lambda token: token != tokenizer.end_token, tokens))
    assert capsys.readouterr().out == "abc" + tokenizer.decode(until_end) + "\n"
