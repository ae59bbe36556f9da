"""What `generate` writes: whole characters as soon as they are whole, drafts in another colour on a terminal."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import HuggingFaceTrunk, LinearHeads, MTPModel, RecurrentHeads, TransformerTrunk
from mtp_modules.commands.generate import _difference, generate
from mtp_modules.commands.writing import COLOURS, TokenWriter
from mtp_modules.data.tokenizers import ByteTokenizer, WordTokenizer
from mtp_modules.decoders import SpeculativeDecoder, TypicalAcceptance
from tests.command_line import refusal, run

OWN = "\033[0m"
FIRST, SECOND, LAST = (f"{OWN}\033[4;38;5;{colour}m" for colour in (29, 63, 131))


def written(tokens: list[int], depths: list[int], *, colour: bool = False) -> list[str]:
    writer = TokenWriter(ByteTokenizer(), colour)
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
    writer = TokenWriter(WordTokenizer(words=["the", "dog", "."]), False, prompt=[0])
    assert [writer.write(token, depth=0) for token in (1, 2, 9, 0)] == [" dog", ".", "", " the"]


def test_drafts_are_underlined_in_a_colour_for_each_depth() -> None:
    tokens, depths = list(b"a cd "), [1, 2, 0, 1, 1]
    wanted = f"{FIRST}a{SECOND} {OWN}c{FIRST}d {OWN}"
    assert "".join(written(tokens, depths, colour=True)) == wanted
    assert "".join(written(tokens, depths)) == "a cd "
    assert "".join(written(list(b"ab"), [50, 60], colour=True)) == f"{LAST}a{LAST}b{OWN}"


@pytest.mark.parametrize("background", [0.0, 1.0])
def test_colours_have_contrast_with_black_and_with_white(background: float) -> None:
    """WCAG 2's ratio of relative luminances; colours 16 to 231 are a cube of six levels."""
    levels = (0, 95, 135, 175, 215, 255)
    for colour in COLOURS:
        place = colour - 16
        parts = [levels[place // 36] / 255, levels[place // 6 % 6] / 255, levels[place % 6] / 255]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        lighter, darker = sorted([luminance + 0.05, background + 0.05], reverse=True)
        assert lighter / darker >= 4.5, colour
    assert len(set(COLOURS)) == len(COLOURS) == 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    trunk = TransformerTrunk(vocab_size=128, d_model=8, num_layers=1, num_heads=2, max_positions=64)
    heads = RecurrentHeads(d_model=8, embedding_width=8, num_horizons=3)
    folder = tmp_path_factory.mktemp("model")
    MTPModel(trunk=trunk, heads=heads).save_pretrained(folder, tokenizer=ByteTokenizer())
    return folder


LOSSLESS = {
    "lookup": [
        "--decoder",
        "SpeculativeDecoder",
        "--decoder.drafter",
        "PromptLookup",
        "--decoder.drafter.longest",
        "2",
    ],
    "lookup or heads": ["--decoder=SpeculativeDecoder", "--decoder.drafter=LookupOrHeads"],
    "policy": ["--decoder=SpeculativeDecoder", "--decoder.policy=CostAwareDepth"],
    "confidence": ["--decoder=SpeculativeDecoder", "--decoder.policy=ConfidentDepth", "--decoder.policy.threshold=0.1"],
    "tree": ["--decoder=SpeculativeDecoder", "--decoder.tree=StaticTree", "--decoder.tree.widths=[2, 1]"],
    "dynamic tree": ["--decoder=SpeculativeDecoder", "--decoder.tree=DynamicTree", "--decoder.tree.depth=2"],
    "plain": ["--decoder", "AutoregressiveDecoder"],
    "one beam": ["--decoder=BeamDecoder", "--decoder.num_beams=1"],
    "sampling": ["--sampling.temperature=0"],
}
OTHERS = {
    "rejection": ["--decoder=SpeculativeDecoder", "--decoder.acceptance=RejectionSampling", "--temperature=0.8"],
    "blocks": ["--decoder=SpeculativeDecoder", "--decoder.acceptance=BlockVerification", "--temperature=0.8"],
    "typical": ["--decoder=SpeculativeDecoder", "--decoder.acceptance=TypicalAcceptance", "--temperature=0.8"],
    "top k": ["--decoder=SpeculativeDecoder", "--decoder.acceptance=TopKAcceptance", "--decoder.acceptance.top_k=3"],
    "beams": ["--decoder=DraftedBeamDecoder", "--decoder.num_beams=3"],
    "penalties": ["--sampling=SamplingParams", "--sampling.repetition_penalty=1.3"],
}


def test_every_part_of_decoding_is_reached_by_class_name(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ("generate", "--ckpt_path", model, "--prompt", "abab", "--max_new_tokens", "24")
    run(*usual)
    plain = capsys.readouterr().out
    for name, options in LOSSLESS.items():
        run(*usual, *options)
        assert capsys.readouterr().out == plain, name
    for name, options in OTHERS.items():
        run(*usual, *options)
        assert capsys.readouterr().out.startswith("abab"), name


def test_what_does_not_go_together_is_a_sentence(model: Path) -> None:
    for options, sentence in {
        ("--decoder=AutoregressiveDecoder", "--num_drafts=2"): (
            "num_drafts: belongs to the usual decoder; write --decoder.num_drafts instead."
        ),
        ("--sampling.min_p=0.1", "--temperature=0.5"): (
            "sampling: and temperature, top_k and top_p say the same; write --sampling.temperature instead."
        ),
        ("--decoder=BeamDecoder", "--decoder.num_beams=2", "--compare"): (
            "compare: BeamDecoder does not draft; omit compare."
        ),
        ("--decoder=SpeculativeDecoder", "--decoder.drafter=PromptLook"): (
            "decoder.drafter: unknown class 'PromptLook'; did you mean PromptLookup? Known: "
        ),
    }.items():
        assert refusal("generate", model, *options).startswith(sentence)


def test_numbers_are_written_with_spaces() -> None:
    writer = TokenWriter(None, colour=False)
    assert "".join(writer.write(token, depth=0) for token in (1, 22, 3)) == " 1 22 3"


def test_outputs_that_differ_say_where() -> None:
    assert _difference([1, 2, 3], [1, 2, 3]) == "identical"
    assert _difference([1, 2, 3], [1, 5, 3]).startswith("differ from token 2 on:")
    assert _difference([1, 2, 3], [1, 2]).startswith("differ from token 3 on:")
    lossy = SpeculativeDecoder(acceptance=TypicalAcceptance())
    assert _difference([1], [2], lossy) == "differ from token 1 on: TypicalAcceptance is lossy"


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
