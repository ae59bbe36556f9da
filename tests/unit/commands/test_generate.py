"""What `generate` writes: whole characters as soon as they are whole, drafts in another colour on a terminal."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import HuggingFaceTrunk, LinearHeads, MTPModel, RecurrentHeads, TransformerTrunk
from mtp_modules.commands.generate import _difference, _Writer, generate
from mtp_modules.data.tokenizers import ByteTokenizer, WordTokenizer

LIGHT, DARKER, OWN = "\033[38;5;46m", "\033[38;5;40m", "\033[0m"


def written(tokens: list[int], depths: list[int], *, colour: bool = False) -> list[str]:
    writer = _Writer(ByteTokenizer(), colour)
    parts = [writer.write(token, depth=depth) for token, depth in zip(tokens, depths, strict=True)]
    return [*parts, writer.flush()]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_text_comes_out_whole(text: str) -> None:
    tokens = list(text.encode())
    assert "".join(written(tokens, [0] * len(tokens))) == text


def test_a_character_is_shown_with_its_last_byte() -> None:
    tokens = list("aé€😀".encode())
    assert written(tokens, list(range(10))) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


@given(tokens=st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_never_hold_up_the_rest(tokens: list[int]) -> None:
    parts = written([*tokens, *"abcd😀".encode()], [0] * (len(tokens) + 8))
    assert "".join(parts).endswith("abcd😀")


def test_the_first_word_is_parted_from_the_prompt() -> None:
    writer = _Writer(WordTokenizer(words=["the", "dog", "."]), False, prompt=[0])
    assert [writer.write(token, depth=0) for token in (1, 2, 9, 0)] == [" dog", ".", "", " the"]


def test_drafts_are_green_the_darker_the_further_ahead() -> None:
    tokens, depths = list("abcdé".encode()), [1, 2, 0, 1, 1, 2]
    wanted = f"{LIGHT}a{DARKER}b{OWN}c{LIGHT}d{DARKER}é{OWN}"
    assert "".join(written(tokens, depths, colour=True)) == wanted
    assert "".join(written(tokens, depths)) == "abcdé"
    assert "".join(written(list(b"ab"), [50, 60], colour=True)) == f"\033[38;5;22ma\033[38;5;22mb{OWN}"


def test_numbers_are_written_with_spaces() -> None:
    writer = _Writer(None, colour=False)
    assert "".join(writer.write(token, depth=0) for token in (1, 22, 3)) == " 1 22 3"


def test_outputs_that_differ_say_where() -> None:
    assert _difference([1, 2, 3], [1, 2, 3]) == "identical"
    assert _difference([1, 2, 3], [1, 5, 3]).startswith("differ from token 2 on:")
    assert _difference([1, 2, 3], [1, 2]).startswith("differ from token 3 on:")


@pytest.mark.parametrize("num_horizons", [1, 3])
def test_generate_writes_prompt_and_continuation(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], num_horizons: int
) -> None:
    torch.manual_seed(0)
    trunk = TransformerTrunk(vocab_size=128, d_model=8, num_layers=1, num_heads=2, max_positions=32)
    model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=num_horizons))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, tokenizer=ByteTokenizer())
    generate(str(folder), prompt="ab", max_new_tokens=12)
    printed = capsys.readouterr().out
    assert printed.startswith("ab")
    assert len(printed) == 2 + 12 + 1


def test_ids_beyond_the_tokenizer_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    trunk = TransformerTrunk(vocab_size=2560, d_model=8, num_layers=1, num_heads=2, max_positions=64)
    model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2))
    model.save_pretrained(tmp_path, tokenizer=ByteTokenizer())
    generate(str(tmp_path), prompt="ab", max_new_tokens=40, temperature=1.0, stop=["no such text"])
    printed = capsys.readouterr().out
    assert printed.startswith("ab")
    assert len(printed) < 2 + 40


def save_hugging_face_model(folder: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = {"model_type": "llama", **sizes, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = MTPModel(trunk=HuggingFaceTrunk(config=config), heads=RecurrentHeads(d_model=16, num_horizons=3))
    model.save_pretrained(folder, tokenizer=ByteTokenizer())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hugging_face_model_is_compiled_in_our_own_trunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hugging_face_model(tmp_path)
    options = ["--ckpt_path", str(tmp_path), "--prompt", "ab", "--max_new_tokens", "12", "--compile", "true"]
    command = [sys.executable, "-m", "mtp_modules", "generate", *options]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    generate(str(tmp_path), prompt="ab", max_new_tokens=12)
    assert compiled.stdout == capsys.readouterr().out
