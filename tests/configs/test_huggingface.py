"""From a model of transformers in a folder to trained heads and generated text, by the command line."""

from pathlib import Path

import pytest
import torch
import yaml

from mtp_modules.training import load_model
from mtp_modules.trunks import HuggingFaceTrunk
from tests.command_line import run
from tests.huggingface import save_model, save_tokenizer


def test_heads_are_trained_on_a_frozen_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs"
    own = save_model("llama", theirs)
    save_tokenizer(theirs)
    for index in range(12):
        (tmp_path / f"text_{index}.txt").write_text("abc ab cca\n" * 20, encoding="utf-8")
    config = {
        "model": {
            "trunk": {"class_path": "HuggingFaceTrunk", "init_args": {"pretrained": str(theirs), "max_positions": 32}},
            "heads": {"class_path": "RecurrentHeads", "init_args": {"num_horizons": 3}},
            "loss": {"class_path": "MultiTokenLoss"},
            "tie_embeddings": False,
            "freeze": ["trunk", "unembedding"],
        },
        "data": {
            "class_path": "TextDataModule",
            "init_args": {
                "sources": [str(tmp_path / "text_*.txt")],
                "window": 16,
                "batch_size": 4,
                "val_share": 0.25,
                "test_share": 0.25,
                "tokenizer": {"class_path": "HuggingFaceTokenizer", "init_args": {"pretrained": str(theirs)}},
            },
        },
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "run"),
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run("fit", "--config", path)
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    model, tokenizer = load_model(str(checkpoint))
    assert isinstance(model.trunk, HuggingFaceTrunk)
    assert tokenizer is not None
    trained = dict(own.base_model.named_parameters())
    for name, parameter in model.trunk.model.named_parameters():
        assert torch.equal(parameter, trained[name])
    assert torch.equal(model.unembedding.weight, own.get_output_embeddings().weight)
    model.save_pretrained(tmp_path / "ours", tokenizer=tokenizer)
    for file in theirs.iterdir():
        file.unlink()
    capsys.readouterr()
    run("generate", "--ckpt_path", tmp_path / "ours", "--prompt", "abc", "--max_new_tokens", "5")
    printed = capsys.readouterr().out
    assert printed.startswith("abc")
    assert len(tokenizer.encode(printed.rstrip("\n"))) > 1
