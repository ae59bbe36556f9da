"""A YAML is bounded, and what is no YAML is one sentence."""

from pathlib import Path

import pytest

from mtp_modules.commands.held_out import _check_found
from mtp_modules.configuration import SentenceParser, read_yaml
from mtp_modules.core.checks import InputError

LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "a: &a {x: 1}\nb0: &b0 {<<: [*a, *a]}\n" + "".join(
    f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
BAD = {
    "merges": (MERGES.encode(), "has more than 100000 values, or merges a mapping into itself"),
    "merged into itself": (b"a: &a {<<: *a, b: 1}", "has more than 100000 values, or merges a mapping into itself"),
    "aliases": (LAUGHS.encode(), "has more than 100000 values"),
    "nested": (b"a: " + b"[" * 3000 + b"]" * 3000, "nested"),
    "an empty number": (b'a: !!float ""', "a tag has a value that it does not take"),
    "a time that is none": (b'a: !!timestamp "x"', "a tag has a value that it does not take"),
    "neither true nor false": (b'a: !!bool "x"', "a tag has a value that it does not take"),
    "binary": (b"\xff\xfe\x00\x80", "is not text in UTF-8; give a YAML file"),
    "a NUL": (b"a: b\x00", "control characters are not allowed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_yaml_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, sentence = BAD[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_yaml("x", path)
    parser = SentenceParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--a", type=str)
    with pytest.raises(InputError, match=sentence):
        parser.parse_args(["--config", str(path)])


def test_aliases_are_fine(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc: *a\n", encoding="utf-8")
    assert read_yaml("x", tmp_path / "x.yaml") == {"a": {"b": 1}, "c": {"b": 1}}
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc: &c {<<: *a, d: 2}\ne: {<<: [*a, *c]}\n", encoding="utf-8")
    assert read_yaml("x", tmp_path / "x.yaml")["e"] == {"b": 1, "d": 2}


def test_a_configuration_that_was_found_names_only_this_package() -> None:
    ours = {
        "class_path": "mtp_modules.data.TextDataModule",
        "init_args": {"tokenizer": {"class_path": "ByteTokenizer"}},
    }
    _check_found(Path("config.yaml"), ours)
    for section in (
        {"class_path": "beside.Data"},
        {"class_path": "TextDataModule", "init_args": {"tokenizer": {"class_path": "mtp_modulesx.Tokenizer"}}},
        {"class_path": "TextDataModule", "init_args": {"tokenizer": {"init_args": {"pretrained": "gpt2"}}}},
        {"class_path": "TextDataModule", "init_args": {"sources": [{"init_args": {"dataset": "a/b"}}]}},
        {"class_path": "StreamedDataModule", "init_args": {"train": "s3://bucket/tokens"}},
    ):
        with pytest.raises(InputError, match=r"came with the checkpoint and names .*give data=config\.yaml"):
            _check_found(Path("config.yaml"), section)
