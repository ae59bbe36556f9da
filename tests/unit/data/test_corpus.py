"""Files are found once, split by name alone, and encoded without loss."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data import ByteTokenizer, load_splits
from mtp_modules.data.corpus import SPLITS, SourceFile, encode_files, find_files, split_files, split_of


class Words(Tokenizer):
    """Ids from a table that the test controls."""

    def __init__(self, *, size: int, end: int | None = None, shift: int = 0) -> None:
        self.size, self.end, self.shift = size, end, shift

    @property
    def vocab_size(self) -> int:
        return self.size

    @property
    def end_token(self) -> int | None:
        return self.end

    def encode(self, text: str) -> list[int]:
        return [len(word) + self.shift for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join("x" * token for token in tokens)


def test_folder_takes_files_of_the_suffixes_only(corpus: Path) -> None:
    assert len(find_files([str(corpus)])) == 60
    assert [file.name for file in find_files([str(corpus)], [".md"])] == ["notes.md"]
    assert len(find_files([str(corpus)], [".md", ".py"])) == 61


def test_hidden_files_and_caches_are_left_out(corpus: Path) -> None:
    for folder in (".git", "__pycache__"):
        (corpus / folder).mkdir()
        (corpus / folder / "x.py").write_text("no", encoding="utf-8")
    assert len(find_files([str(corpus)])) == 60


def test_patterns_and_files_are_taken_as_they_are(corpus: Path) -> None:
    assert [file.name for file in find_files([str(corpus / "*.md")])] == ["notes.md"]
    assert {file.name.split("/")[0] for file in find_files([str(corpus / "part[01]" / "*.py")])} <= {
        "part0",
        "part1",
    } | {f"file{number}.py" for number in range(60)}
    assert len(find_files([str(corpus / "**" / "*.py")])) == 60
    assert [file.name for file in find_files([str(corpus / "notes.md")])] == ["notes.md"]


def test_a_pattern_is_relative_to_the_folder_before_it(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    absolute = find_files([str(corpus / "**" / "*.py")])
    assert [file.name for file in find_files(["**/*.py"])] == [file.name for file in absolute]
    assert {file.name.split("/")[0] for file in absolute} == {"part0", "part1", "part2"}


def test_a_file_of_two_sources_counts_once(corpus: Path) -> None:
    files = find_files([str(corpus), str(corpus / "part0"), str(corpus / "part0" / "*.py")])
    assert len(files) == 60
    assert files[0].name.startswith("part")


def test_the_standard_library_is_a_corpus() -> None:
    files = find_files(["stdlib"])
    names = {file.name for file in files}
    assert {"typing.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or "/tests/" in name for name in names)
    assert sum(file.path.stat().st_size for file in files) > 5_000_000
    assert all(side for side in split_files(files, val_share=0.05, test_share=0.05).values())


def test_the_split_is_the_same_on_another_machine(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(corpus, copy)
    shares = {"val_share": 0.2, "test_share": 0.2}
    here, there = (split_files(find_files([str(root)]), **shares) for root in (corpus, copy))
    for split in SPLITS:
        assert [file.name for file in here[split]] == [file.name for file in there[split]]


def test_every_file_is_on_exactly_one_side(corpus: Path) -> None:
    files = find_files([str(corpus)])
    sides = split_files(files, val_share=0.2, test_share=0.2)
    assert sorted(file.name for side in sides.values() for file in side) == sorted(file.name for file in files)


def test_the_split_is_pinned() -> None:
    """A change here moves files between the sides of every run that exists."""
    names = [f"file{number}.py" for number in range(12)]
    sides = " ".join(split_of(name, val_share=0.3, test_share=0.3)[:2] for name in names)
    assert sides == "tr tr te tr te tr te tr te tr te tr"
    many = [split_of(f"{number}", val_share=0.05, test_share=0.1) for number in range(20_000)]
    assert many.count("val") / 20_000 == pytest.approx(0.05, abs=0.006)
    assert many.count("test") / 20_000 == pytest.approx(0.1, abs=0.008)


def test_a_share_of_zero_leaves_the_side_out(corpus: Path) -> None:
    assert list(split_files(find_files([str(corpus)]), val_share=0.0, test_share=0.0)) == ["train"]


def test_streams_hold_every_file_and_its_end(corpus: Path) -> None:
    tokenizer = ByteTokenizer()
    files = find_files([str(corpus)])
    stream = encode_files(files, tokenizer)
    assert stream.tokens.dtype == np.uint16
    texts = tokenizer.decode(stream.tokens.tolist()).split("\0")
    assert texts == [file.path.read_text(encoding="utf-8") for file in files] + [""]
    assert [texts[0], texts[1]] == [
        tokenizer.decode(stream.tokens[start : end - 1].tolist())
        for start, end in zip(stream.document_starts[:2], stream.document_starts[1:3], strict=True)
    ]
    assert stream.names == tuple(file.name for file in files)


def test_large_vocabularies_and_tokenizers_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a bb ccc", encoding="utf-8")
    (tmp_path / "b.py").write_text("dddd", encoding="utf-8")
    stream = encode_files(find_files([str(tmp_path)]), Words(size=2**16 + 1))
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens.tolist() == [1, 2, 3, 4]
    assert stream.document_starts.tolist() == [0, 3]
    with_end = encode_files(find_files([str(tmp_path)]), Words(size=9, end=8))
    assert with_end.tokens.tolist() == [1, 2, 3, 8, 4, 8]
    with pytest.raises(ValueError, match=r"Words gave 'a.py' a token outside 0..2"):
        encode_files(find_files([str(tmp_path)]), Words(size=3))


def test_what_is_no_text_is_left_out_with_a_warning_or_refused(corpus: Path) -> None:
    (corpus / "bad.py").write_bytes(b"\xff\xfe\x00")
    (corpus / "empty.py").write_text("", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"left out 1 files that are not UTF-8 text, the first is 'bad.py'"):
        stream = encode_files(find_files([str(corpus)]), ByteTokenizer())
    assert len(stream.names) == 60
    with pytest.raises(ValueError, match="is not UTF-8 text; convert it or leave it out"):
        encode_files(find_files([str(corpus / "bad.py")]), ByteTokenizer())


def test_digest_follows_tokens_and_boundaries(corpus: Path) -> None:
    stream = encode_files(find_files([str(corpus)]), ByteTokenizer())
    assert stream.digest() == encode_files(find_files([str(corpus)]), ByteTokenizer()).digest()
    assert stream.digest() != encode_files(find_files([str(corpus)])[1:], ByteTokenizer()).digest()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "sources must be a list of at least one"),
        (["no/such/path"], "source 'no/such/path' does not exist; give a file"),
        (["no/such/*.py"], r"source 'no/such/\*.py' holds no file"),
    ],
)
def test_sources_that_hold_nothing_are_refused(sources: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_files(sources)


def test_a_folder_without_matching_files_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file that ends in .txt or .c; name other files or suffixes"):
        find_files([str(corpus)], [".txt", ".c"])


def test_a_side_without_a_file_is_refused_with_the_way_out() -> None:
    files = [SourceFile(Path("a"), "a")]
    with pytest.raises(ValueError, match="split got none of the 1 files; add files"):
        split_files(files, val_share=0.05, test_share=0.05)
    with pytest.raises(ValueError, match="val_share, or set it to 0 to go without"):
        split_files(files, val_share=0.05, test_share=0)
    name = next(str(number) for number in range(99) if split_of(str(number), val_share=0.9, test_share=0) == "val")
    with pytest.raises(ValueError, match="train split got none of the 1 files; add files, lower the other shares"):
        split_files([SourceFile(Path(name), name)], val_share=0.9, test_share=0)


@pytest.mark.parametrize(("val_share", "test_share"), [(0.5, 0.5), (1.0, 0.0)])
def test_shares_that_leave_no_training_are_refused(val_share: float, test_share: float) -> None:
    with pytest.raises(ValueError, match=r"val_share \+ test_share must be below 1"):
        split_files([], val_share=val_share, test_share=test_share)


def test_load_splits_is_the_three_steps(corpus: Path) -> None:
    splits = load_splits([str(corpus)], ByteTokenizer(), val_share=0.2, test_share=0.2)
    assert list(splits) == ["train", "val", "test"]
    assert sum(len(stream.names) for stream in splits.values()) == 60
