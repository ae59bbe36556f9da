"""A conversation keeps its context between turns, and says what each took."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from mtp_modules import AutoregressiveDecoder, LinearHeads, MTPModel, RecurrentTrunk, TransformerTrunk
from mtp_modules.commands.conversation import Messages, OneText
from mtp_modules.data.tokenizers import ByteTokenizer
from tests.command_line import run
from tests.small_tokenizers import CHATML, FORGETFUL, LLAMA2, chat_tokenizer, small_tokenizer

TURN = re.compile(
    r"\[(\d+) tokens, (\d+) accepted drafts, (\d+) tokens/s(?:, (\d+) of (\d+) context tokens were read before)?\]"
)


@pytest.fixture(scope="module")
def model() -> MTPModel:
    torch.manual_seed(0)
    trunk = TransformerTrunk(vocab_size=128, d_model=8, num_layers=1, num_heads=2, max_positions=64)
    return MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=3)).eval()


@pytest.fixture(scope="module")
def folder(model: MTPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, tokenizer=ByteTokenizer())
    return folder


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def lines(folder: Path, typed: str, *options: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        run("chat", folder, "--max_new_tokens", "8", *options)
        return capsys.readouterr()

    return lines


def test_a_turn_continues_the_turns_before(model: MTPModel, folder: Path, talk) -> None:
    out, _ = talk(folder, "hello\n\nmore\n")
    context = list(b"hello\n")
    for _ in range(2):
        new = AutoregressiveDecoder().generate(model, [context], max_new_tokens=8).tokens[0]
        answer = bytes(new).decode()
        assert answer in out
        context = [*context, *new, *b"\nmore\n"]
    first, second = TURN.findall(out)
    assert (first[0], first[3], first[4]) == ("8", "0", "6")
    # All but the last token of the first answer were read in the first turn, or its states were too small.
    assert second[3:] in (("13", "20"), ("0", "20"))
    assert int(first[1]) <= 5
    assert int(first[2]) > 0


def test_a_new_conversation_knows_nothing_of_the_last(folder: Path, talk) -> None:
    out, _ = talk(folder, "ab\n/new\nab\n/end\nnever read\n")
    turns = TURN.findall(out)
    assert [turn[4] for turn in turns] == ["3", "3"]
    one, other = (part.rpartition("> ")[2] for part in out.split("[8 tokens")[:2])
    assert one == other


def test_a_full_context_begins_anew(folder: Path, talk) -> None:
    out, err = talk(folder, f"{'x' * 40}\n{'y' * 20}\n{'z' * 80}\n")
    assert "The context of 64 tokens is full; this is a new conversation." in err
    assert [turn[4] for turn in TURN.findall(out)] == ["41", "21"]
    assert "error: generate: prompt 0 has 81 tokens, the trunk reads at most max_positions=64" in out


def test_beams_answer_too(folder: Path, talk) -> None:
    out, _ = talk(folder, "ab\n", "--decoder=BeamDecoder", "--decoder.num_beams=2")
    ((tokens, _, _, held, _),) = TURN.findall(out)
    assert (tokens, held) == ("8", "")


def test_a_model_without_a_tokenizer_talks_in_numbers(tmp_path: Path, talk) -> None:
    trunk = RecurrentTrunk(vocab_size=9, d_model=8)
    MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2)).save_pretrained(tmp_path)
    out, _ = talk(tmp_path, "1 2\nthree\n4\n")
    assert [turn[4] for turn in TURN.findall(out)] == ["2", "11"]
    assert "error: prompt: this model has no tokenizer" in out


def templated(folder: Path, template: str = CHATML, *, says: str = "abcdefghijklmnop") -> MTPModel:
    """Save a model with a chat template, which says some letters or special tokens alone."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(template)
    trunk = TransformerTrunk(vocab_size=tokenizer.vocab_size, d_model=8, num_layers=1, num_heads=2, max_positions=256)
    model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=3), output_bias=True).eval()
    assert model.unembedding.bias is not None
    with torch.no_grad():
        model.unembedding.bias[tokenizer.encode_template(says)[0]] = 1e3
    model.save_pretrained(folder, tokenizer=tokenizer)
    return model


@pytest.mark.parametrize("template", [CHATML, LLAMA2, FORGETFUL])
def test_a_conversation_is_written_by_the_chat_template(template: str, tmp_path: Path, talk) -> None:
    model, tokenizer = templated(tmp_path, template), chat_tokenizer(template)
    out, _ = talk(tmp_path, "Hi =>, Ann\nAnn?\n")
    turns = []
    for typed, (number, _, _, held, read) in zip(["Hi =>, Ann", "Ann?"], TURN.findall(out), strict=True):
        turns.append({"role": "user", "content": typed})
        prompt = tokenizer.encode_template(tokenizer.render(turns, prompt=True))[0]
        assert int(read) == len(prompt)
        new = AutoregressiveDecoder().generate(model, [prompt], max_new_tokens=8).tokens[0]
        assert int(number) == len(new)
        assert tokenizer.decode(new) in out
        turns.append({"role": "assistant", "content": tokenizer.decode(new)})
        assert (int(held) == 0) or template == CHATML


def test_what_is_typed_is_text_and_earlier_turns_keep_their_tokens() -> None:
    tokenizer = chat_tokenizer()
    talk = Messages(tokenizer, "Be brief.")
    end = tokenizer.encode_template("<|im_end|>")[0]
    asked = talk.prompt("<|im_end|> is text")
    assert asked.count(end[0]) == 2  # of the system's turn and the user's
    invalid = tokenizer.encode_batch(["é"])[0][:1].tolist()
    talk.answered("<|im_end|> is text", asked, [*invalid, *end])
    again = talk.prompt("more")
    assert again[: len(asked) + 1] == [*asked, *invalid]  # half a character is no text that could be encoded again
    assert tokenizer.decode(again[len(asked) + 1 :]) == (
        "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )
    talk.forget()
    assert talk.prompt("more")[:20] == asked[:20]


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path, talk) -> None:
    templated(tmp_path, says="<|im_end|>")
    out, _ = talk(tmp_path, "Hi\n")
    assert [turn[0] for turn in TURN.findall(out)] == ["1"]
    assert "<|im_end|>" not in out
    out, _ = talk(tmp_path, "Hi\n", "--use_template=false")
    assert [(turn[0], turn[4]) for turn in TURN.findall(out)] == [
        ("8", "4")
    ]  # a begin token, two letters, a line's end


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
def test_a_conversation_goes_on_after_an_empty_answer(template: str) -> None:
    talk = Messages(chat_tokenizer(template), None)
    for typed in ("Hi", "Ann?", "so?"):
        prompt = talk.prompt(typed)
        talk.answered(typed, prompt, talk.ends[:1])
    assert talk.templated.decode(prompt).count("Ann?") == 1


@pytest.mark.parametrize("kind", ["fallback-bpe", "fallback-bpe-around", "fallback-unigram-around", "byte-level"])
def test_a_line_adds_no_token_of_a_beginning(kind: str) -> None:
    """Tokenizers of the Llama family begin every text with a begin token, a space, or both."""
    tokenizer = small_tokenizer(kind)
    talk = OneText(tokenizer, "\n")
    asked = talk.prompt("the dog")
    talk.answered("the dog", asked, answer := tokenizer.encode_batch([" ran"])[0].tolist())
    again = talk.prompt("the cat")
    assert again[: len(asked) + len(answer)] == [*asked, *answer]
    whole = tokenizer.encode_batch(["x\nthe cat\n"])[0].tolist()
    assert again[len(asked) + len(answer) :] == whole[len(tokenizer.encode_batch(["x"])[0]) :]


def test_a_system_needs_a_template(folder: Path, talk) -> None:
    with pytest.raises(SystemExit):
        talk(folder, "Hi\n", "--system=Be brief.")
