"""The tokenizer of a Hugging Face model."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mtp_modules import build, describe
from mtp_modules.data import HuggingFaceTokenizer, TextDataModule, load_splits
from tests.helpers import VOCAB
from tests.huggingface import save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_text_comes_back(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(pretrained=str(folder))
    text = "abc a\nb cca ab"
    tokens = tokenizer.encode(text)
    assert tokens == [7, 8, 5, 2, 4, 10, 1, 4, 6]
    assert tokenizer.decode(tokens) == text
    assert (tokenizer.vocab_size, tokenizer.end_token) == (VOCAB, 0)
    assert tokenizer.decode([1, 0]) == "a<end>"


def test_it_describes_itself_by_its_content(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(pretrained=str(folder))
    told = json.loads(json.dumps(describe(tokenizer)))
    shutil.rmtree(folder)
    again = build(told)
    assert again.encode("abc ab") == tokenizer.encode("abc ab")
    assert again.end_token == tokenizer.end_token
    assert describe(again) == describe(tokenizer)


def test_another_end_token(folder: Path) -> None:
    assert HuggingFaceTokenizer(pretrained=str(folder), end_token=3).end_token == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "needs either pretrained, the place of a tokenizer, or tokenizer_json, its content."),
        ({"pretrained": "a", "tokenizer_json": "{}"}, "needs either pretrained"),
        (
            {"tokenizer_json": "{}", "revision": "main"},
            "revision is 'main', but pretrained is not given; name the folder or model",
        ),
        ({"tokenizer_json": "{}"}, r"tokenizer_json is no content of a tokenizer\.json \("),
        ({"pretrained": "./nowhere/at/all"}, r"pretrained './nowhere/at/all' cannot be read \("),
    ],
    ids=str,
)
def test_arguments_that_are_refused(arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^HuggingFaceTokenizer: {sentence}"):
        HuggingFaceTokenizer(**arguments)


def test_ids_outside_of_the_vocabulary(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(pretrained=str(folder))
    assert tokenizer.decode([11, 1, 12, 2, 2**31, 3]) == tokenizer.decode([2**70, 1, 2, 2**32, 3]) == "abc"
    sentence = r"^HuggingFaceTokenizer: token -1 is negative; give ids of the vocabulary 0\.\.10\.$"
    with pytest.raises(ValueError, match=sentence):
        tokenizer.decode([1, -1, 2**70])
    with pytest.raises(ValueError, match=r"^HuggingFaceTokenizer: end_token must lie in 0\.\.10, got 11\.$"):
        HuggingFaceTokenizer(pretrained=str(folder), end_token=11)


def trained(path: Path, *, single: str | None, end: str = "</s>") -> Path:
    """Train a tokenizer on a text, and save its file alone."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", end], show_progress=False)
    fast.train_from_iterator(["once upon a time there was a line\n\nand another\n    line"] * 3, trainer)
    if single is not None:
        used = [(token, fast.token_to_id(token)) for token in ("<s>", end)]
        fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    fast.save(str(path))
    return path


@pytest.mark.parametrize("single", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_what_a_post_processor_adds_is_known_and_never_doubled(tmp_path: Path, single: str | None) -> None:
    tokenizer = HuggingFaceTokenizer(pretrained=str(trained(tmp_path / "tokenizer.json", single=single)))
    assert tokenizer.end_token == 2
    begin = [1] if single is not None and single.startswith("<s>") else []
    assert tokenizer.begin_tokens == tuple(begin)
    (alone,) = tokenizer.encode_batch(["once upon"])
    assert tokenizer.encode("once upon") == [*begin, *alone]  # a prompt goes on
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("once upon", encoding="utf-8")
    stream = load_splits([str(tmp_path / "*.txt")], tokenizer, val_share=0.0, test_share=0.0)["train"]
    assert stream.tokens.tolist() == [*begin, *alone, 2] * 2


def test_special_tokens_in_a_text_are_text_unless_wanted(tmp_path: Path) -> None:
    path = str(trained(tmp_path / "tokenizer.json", single=None))
    assert 2 not in HuggingFaceTokenizer(pretrained=path).encode("a line</s>")
    parsing = HuggingFaceTokenizer(pretrained=path, parse_special=True)
    assert parsing.encode("a line</s>")[-1] == 2
    assert build(describe(parsing)).encode("a line</s>")[-1] == 2


def test_templates_and_texts_are_encoded_at_once_each_in_its_own_way(tmp_path: Path) -> None:
    """A corpus of texts and conversations encodes texts in a thread while it reads the next conversations."""
    tokenizer = HuggingFaceTokenizer(pretrained=str(trained(tmp_path / "tokenizer.json", single=None)))
    text = "a b </s> c " * 20
    plain, template = tokenizer.encode_batch([text])[0].tolist(), tokenizer.encode_template(text)[0]
    assert plain != template
    with ThreadPoolExecutor(1) as thread:
        texts = thread.submit(lambda: [tokenizer.encode_batch([text])[0].tolist() for _ in range(3000)])
        while not texts.done():
            assert tokenizer.encode_template(text)[0] == template
    assert all(ids == plain for ids in texts.result())


def test_a_bare_file_or_a_folder_with_nothing_else(tmp_path: Path) -> None:
    path = trained(tmp_path / "tokenizer.json", single="<s> $A")
    by_file, by_folder = (HuggingFaceTokenizer(pretrained=str(place)) for place in (path, tmp_path))
    assert describe(by_file) == describe(by_folder)
    unknown = HuggingFaceTokenizer(pretrained=str(trained(tmp_path / "own.json", single=None, end="<stop>")))
    assert unknown.end_token is None
    (tmp_path / "own.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.json is no tokenizer\.json; give the file that a trained"):
        HuggingFaceTokenizer(pretrained=str(tmp_path / "own.json"))


def test_a_missing_end_token_is_a_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("once upon a time", encoding="utf-8")
    path = str(trained(tmp_path / "own.json", single=None, end="<stop>"))
    for tokenizer, told in ((HuggingFaceTokenizer(pretrained=path, end_token=2), False), (None, False)):
        data = TextDataModule(train=[str(tmp_path / "*.txt")], tokenizer=tokenizer, window=2, lookahead=1, batch_size=1)
        with caplog.at_level("INFO"):
            data.setup()
        assert ("has no end token" in caplog.text) == told
    tokenizer = HuggingFaceTokenizer(pretrained=path)
    data = TextDataModule(train=[str(tmp_path / "*.txt")], tokenizer=tokenizer, window=2, lookahead=1, batch_size=1)
    with caplog.at_level("INFO"):
        data.setup()
    assert "HuggingFaceTokenizer has no end token: nothing marks the end of a document" in caplog.text


def test_prompts_start_at_real_line_starts(tmp_path: Path) -> None:
    """Here, no line end is a token of its own: it ends the token of the last word."""
    path = trained(tmp_path / "tokenizer.json", single="<s> $A")
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
    text = "once upon a time\nthere was a line\nand another line\n" * 20
    fast.train_from_iterator([text], trainers.BpeTrainer(vocab_size=40, special_tokens=["<s>"], show_progress=False))
    fast.save(str(path))
    tokenizer = HuggingFaceTokenizer(pretrained=str(path))
    assert tokenizer.encode("\n")[-1] not in tokenizer.encode(text)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = TextDataModule(train=[str(tmp_path / "a.txt")], tokenizer=tokenizer, window=8, lookahead=2, batch_size=1)
    prompts = ["".join(map(fast.id_to_token, prompt)) for prompt in data.prompts("train", 30, 3, 0)]
    assert all(prompt.startswith(("once", "there", "and")) for prompt in prompts)


def test_a_long_text_is_encoded_in_parts_as_if_it_were_whole(tmp_path: Path) -> None:
    fast = FastTokenizer.from_file(str(trained(tmp_path / "a.json", single="<s> $A")))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()  # puts a space before every text
    fast.save(str(tmp_path / "b.json"))
    text = "once upon a time\nthere was a line and another line\n" * 4000
    for name in ("a.json", "b.json"):
        tokenizer = HuggingFaceTokenizer(pretrained=str(tmp_path / name))
        (tmp_path / "long.txt").write_text(text, encoding="utf-8")
        stream = load_splits([str(tmp_path / "long.txt")], tokenizer, val_share=0.0, test_share=0.0)["train"]
        np.testing.assert_array_equal(stream.tokens, [*tokenizer.encode(text), 2])
