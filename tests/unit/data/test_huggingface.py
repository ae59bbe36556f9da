"""The tokenizer of a Hugging Face model."""

import json
import shutil
from pathlib import Path

import pytest

from mtp_modules import build, describe
from mtp_modules.data import HuggingFaceTokenizer
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
