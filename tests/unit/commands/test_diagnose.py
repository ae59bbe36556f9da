"""The command `diagnose`: from a checkpoint and files to tables, figures and a page."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from mtp_modules import MTPModel, RecurrentHeads, RecurrentTrunk
from mtp_modules.commands.held_out import held_out_batches, prompts_of
from mtp_modules.data import ProgressionDataModule
from mtp_modules.data.tokenizers import ByteTokenizer
from tests.command_line import refusal, run
from tests.pages import Outline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text file, a model of bytes and a model of numbers, both untrained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("diagnose")
    (folder / "text").mkdir()
    for name in "abcdefghijkl":
        (folder / "text" / f"{name}.py").write_text(f"def {name}(x):\n    return x < {name!r}\n" * 40, encoding="utf-8")
    for name, size, tokenizer in (("bytes", 256, ByteTokenizer()), ("numbers", 50, None)):
        trunk, heads = RecurrentTrunk(vocab_size=size, d_model=8), RecurrentHeads(d_model=8, num_horizons=3)
        MTPModel(trunk=trunk, heads=heads).save_pretrained(folder / name, tokenizer=tokenizer)
    progressions = {
        "class_path": "ProgressionDataModule",
        "init_args": {"batch_size": 8, "length": 12, "steps": [1, 2]},
    }
    (folder / "numbers.yaml").write_text(yaml.safe_dump({"data": progressions, "model": {}}), encoding="utf-8")
    return folder


SMALL = ("--rows=8", "--prompts=2", "--prompt_length=8", "--new_tokens=4", "--every=32")


def test_text_from_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    text = (f"--sources=[{folder / 'text'}]", "--split=all")
    run("diagnose", "--ckpt_path", folder / "bytes", *text, *SMALL, "--html", page, "--json", figures)
    printed = capsys.readouterr().out
    for title in (
        "Number of drafts",
        "Drafts by depth",
        "Accuracy of every head",
        "kinds of tokens",
        "Position in the line",
    ):
        assert title in printed
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert len(found["numbers"]) == 3
    assert len(found["accuracies"]) == 3
    assert found["depths"][0]["reached"] == found["rounds"]
    assert sum(one["count"] for one in found["depths"][0]["bins"]) == found["rounds"]
    assert all(" ".join(sentence.split()) in " ".join(printed.split()) for sentence in found["verdict"])
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.tags.count("svg") == 5  # speed-ups, drafts, two squares, heads
    assert "script" not in outline.tags
    assert set(found["verdict"]) <= set(outline.text)
    assert not re.findall(r"https?:|src=|url\(|@import", page.read_text(encoding="utf-8"))


def test_data_from_a_configuration(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("diagnose", "--ckpt_path", folder / "numbers", "--data", folder / "numbers.yaml", *SMALL)
    printed = capsys.readouterr().out
    assert "forecast" in printed
    assert "kinds of tokens" not in printed
    # The same, from the configuration that a run leaves beside its checkpoints.
    (tmp_path / "run").mkdir()
    (folder / "numbers").rename(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "config.yaml").write_text(
        (folder / "numbers.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    try:
        run("diagnose", "--ckpt_path", tmp_path / "run" / "checkpoints", *SMALL)
    finally:
        (tmp_path / "run" / "checkpoints").rename(folder / "numbers")
    assert "forecast" in capsys.readouterr().out


def test_batches_are_spread_and_prompts_are_beginnings() -> None:
    data = ProgressionDataModule(batch_size=4, lookahead=3, vocab_size=50, length=12, steps=[1, 2])
    every = torch.cat([batch["tokens"] for batch in held_out_batches(data, "val", 10_000)])
    some = held_out_batches(data, "val", 8)
    assert [len(batch["tokens"]) for batch in some] == [4, 4]
    assert torch.equal(some[0]["tokens"], every[:4])
    assert not torch.equal(some[1]["tokens"], every[4:8])
    prompts = prompts_of(some, 2, 100)
    half = every.shape[1] // 2
    assert prompts == [some[0]["tokens"][0, :half].tolist(), some[1]["tokens"][0, :half].tolist()]
    crossing = {"tokens": every[:2], "document_ids": torch.tensor([[0] * 15, [0] * 2 + [1] * 13])}
    assert prompts_of([crossing], 5, 4) == [every[0, :4].tolist()]


def test_what_diagnose_refuses(folder: Path, tmp_path: Path) -> None:
    def said(*arguments: str | Path) -> str:
        return refusal("diagnose", "--ckpt_path", *arguments)

    text = f"--sources=[{folder / 'text'}]"
    assert said(folder / "bytes") == (
        f'diagnose: {folder / "bytes"} has no config.yaml with its data; give sources, such as "[stdlib]", or data, '
        "a configuration of fit."
    )
    assert said(folder / "bytes", text, "--data=x.yaml") == (
        "diagnose: data and sources exclude each other; give one of them."
    )
    assert said(folder / "numbers", text).startswith("sources: this model has no tokenizer for text files")
    assert said(folder / "bytes", "--data=x.yaml").startswith("data: x.yaml does not exist; give a configuration")
    (tmp_path / "none.yaml").write_text("model: 3\n", encoding="utf-8")
    assert said(folder / "bytes", f"--data={tmp_path / 'none.yaml'}").startswith(
        f"data: {tmp_path / 'none.yaml'} has no data section with a class_path"
    )
    (tmp_path / "wrong.yaml").write_text("data: {class_path: Texts}\n", encoding="utf-8")
    assert said(folder / "bytes", f"--data={tmp_path / 'wrong.yaml'}").startswith(
        "data: unknown class 'Texts'. Known: "
    )
    assert said(folder / "bytes", text, "--split=train") == (
        "diagnose: split must be val or test, which the model was not trained on, or all, got 'train'."
    )
    assert said(folder / "numbers", f"--data={folder / 'numbers.yaml'}", "--split=all") == (
        "diagnose: split=all reads every file of sources; give sources that the model was not trained on."
    )
    assert said(folder / "bytes", text, "--split=val").startswith("TextDataModule: the test split got none of the 12")
    assert said(folder / "bytes", text, "--rows=0") == "diagnose: rows must be at least 1, got 0."
    assert said(folder / "bytes", text, "--split=all", "--prompts=0") == "diagnose: prompts must be at least 1, got 0."
    assert said(folder / "bytes", text, f"--html={tmp_path}") == (
        f"html: {tmp_path} is a folder; give the name of a file in it."
    )
    assert said(folder / "bytes", text, f"--json={tmp_path / 'no' / 'a.json'}") == (
        f"json: there is no folder {tmp_path / 'no'} for a.json; make it, or write elsewhere."
    )
