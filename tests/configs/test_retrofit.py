"""The retrofit of a trained model, with a small one in the place of SmolLM2: the commands of docs/retrofit.md."""

import contextlib
import io
import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mtp_modules import AutoregressiveDecoder, MTPModel, SpeculativeDecoder
from mtp_modules.configuration import assemble
from mtp_modules.core import Tokenizer
from mtp_modules.data.token_files import read_documents
from mtp_modules.loading import load_model
from tests.command_line import RETROFIT, ROOT, run

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def config(small: Path) -> Path:
    """Return the shipped configuration with other places and smaller sizes, and nothing else changed."""
    given = yaml.safe_load(RETROFIT.read_text(encoding="utf-8"))
    for owner in (given["model"]["trunk"], given["data"]["init_args"]["tokenizer"]):
        owner["init_args"]["pretrained"] = str(small)
        del owner["init_args"]["gguf_file"]
    given["model"]["num_draft_tokens"] = 64
    given["model"]["trunk"]["init_args"]["feature_layers"] = [0]
    given["model"]["heads"]["init_args"] |= {"num_heads": 4, "num_kv_heads": 2, "num_features": 1}
    given["data"]["init_args"] |= {"sources": [str(ROOT / "mtp_modules")], "train": [str(small / "own.bin")]}
    given["data"]["init_args"] |= {"window": 24, "max_eval_windows": 2, "batch_size": 4}
    given["data"]["init_args"]["cached_states"]["init_args"] = {"folder": str(small / "states")}
    path = small / "retrofit.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(config: Path) -> str:
    """Sample the model's own text, train on it, and return the last line that the run printed."""
    folder, own = config.parent / "run", config.parent / "own.bin"
    run("sample", config, f"--output={own}", "--count=12", "--prompt_tokens=8", "--new_tokens=16", "--temperature=0")
    ends = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.logger=false"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run("fit", "--config", config, *ends, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}")
    return printed.getvalue().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(config: Path, finished: str) -> tuple[MTPModel, Tokenizer | None]:
    return load_model(config.parent / "run")


def test_the_last_line_of_the_run_is_a_command_that_works(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(finished.removeprefix("Next: python -m mtp_modules "))
    run(*words, "--max_new_tokens=12", "--repeats=1")
    assert "outputs             identical" in capsys.readouterr().out


@torch.inference_mode()
def test_only_the_heads_are_trained_from_states_on_disk(config: Path, trained: tuple) -> None:
    from transformers import LlamaForCausalLM

    model, tokenizer = trained
    before = LlamaForCausalLM.from_pretrained(config.parent).eval()
    tokens = torch.tensor([tokenizer.encode("def f(x):")])
    hidden = model.trunk(tokens).hidden
    torch.testing.assert_close(model.unembedding.logits(hidden), before(tokens).logits)
    index = json.loads((config.parent / "states" / "index.json").read_text())
    assert index["written"] == index["shape"][0] == 12
    assert len(model.unembedding.draft_tokens) == 64
    documents, _ = read_documents(config.parent / "own.bin")
    assert set(np.concatenate(documents).tolist()) & set(model.unembedding.draft_tokens.tolist())
    assert (model.heads.drafter.norms[0].weight != 2.2).any()


def test_decoding_is_lossless(trained: tuple) -> None:
    model, tokenizer = trained
    prompts = [tokenizer.encode("import os\n"), tokenizer.encode("class A:")]
    double = model.double()
    plain = AutoregressiveDecoder().generate(double, prompts, max_new_tokens=24)
    assert SpeculativeDecoder().generate(double, prompts, max_new_tokens=24).tokens == plain.tokens


def test_prompts_are_those_of_a_split_of_the_sources(config: Path, trained: tuple) -> None:
    sections = yaml.safe_load(config.read_text(encoding="utf-8"))
    _, data = assemble(sections["model"], sections["data"])
    output = config.parent / "val.bin"
    sizes = ["--count=3", "--prompt_tokens=8", "--new_tokens=4", "--seed=2"]
    run("sample", config, f"--output={output}", "--split=val", *sizes)
    documents, _ = read_documents(output)
    assert [document[:8].tolist() for document in documents] == data.prompts("val", 3, 8, 2)


def test_training_goes_on_with_samples_alone(config: Path, trained: tuple) -> None:
    output = config.parent / "samples.bin"
    run("sample", config, f"--output={output}", "--count=40", "--prompt_tokens=4", "--new_tokens=12", "--batch_size=20")
    other = ["--data.init_args.train=null", "--data.init_args.train_share=null", "--data.init_args.keep_whole=false"]
    other += [f"--data.init_args.sources=[{output}]", "--data.init_args.window=8"]
    other += ["--data.init_args.cached_states=null"]
    other += ["--data.init_args.val_share=0.2", "--data.init_args.test_share=0.2"]
    ends = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.logger=false"]
    ends += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={config.parent / 'again'}"]
    run("fit", "--config", config, *other, *ends)
    assert (config.parent / "again" / "checkpoints" / "best.ckpt").is_file()


def benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["retrofit.py", *arguments])
    runpy.run_path(str(ROOT / "tests" / "benchmarks" / "retrofit.py"), run_name="__main__")


@pytest.mark.parametrize(
    "kinds",
    [
        ["recurrent", "early_exit"],
        pytest.param(["residual", "recurrent", "early_exit", "joint", "linear"], marks=pytest.mark.nightly),
        pytest.param(["residual_transition", "early_exit"], marks=pytest.mark.nightly),
    ],
    ids=len,
)
def test_the_benchmark_prints_its_table(
    config: Path,
    trained: tuple,
    kinds: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = ["--seconds=0.3", "--prompts=2", "--prompt_tokens=12", "--new_tokens=8", "--drafts=2"]
    benchmark(monkeypatch, f"--config={config}", "--feature_layers", "0", "--kinds", *kinds, *sizes)
    printed = capsys.readouterr().out
    assert "reading one token takes" in printed
    for name in ("plain", "lookup", *kinds, *(f"{kind} or lookup" for kind in kinds)):
        assert f" {name} " in printed
    assert printed.count("2/2") == sum(2 * (rows + 1) for rows in range(1, len(kinds) + 1))  # a table behind each kind
    index = json.loads((config.parent / "states" / "index.json").read_text())
    assert index["shape"][:2] == [12, 2]
    assert index["feature_layers"] == [0]


@pytest.mark.nightly
def test_the_benchmark_can_leave_decoding_out(
    config: Path, trained: tuple, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--seconds=0.3", "--prompt_tokens=12", "--prompts=0"]
    benchmark(monkeypatch, f"--config={config}", *sizes, "--kinds", "linear")
    printed = capsys.readouterr().out
    assert " linear " in printed
    assert printed.count("0/0") == 1  # and no row of plain decoding or lookup
