"""Sources read what people have: any file of text, JSON lines, files of tokens, and the standard library."""

import os
import unicodedata
from pathlib import Path

import pytest

from mtp_modules.data import (
    ByteTokenizer,
    Document,
    DocumentSource,
    JsonLines,
    StandardLibrary,
    TextFiles,
    TokenFiles,
)
from mtp_modules.data.documents import skipped_sentence
from mtp_modules.data.sources import sources_of
from mtp_modules.data.token_files import write_documents


def read(source: DocumentSource) -> dict[str, Document]:
    return {document.name: document for document in source.documents(ByteTokenizer())}


def texts(*paths: object, suffixes: list[str] | None = None) -> dict[str, object]:
    found = read(TextFiles(paths=[str(path) for path in paths], suffixes=suffixes))
    return {name: document.text for name, document in found.items()}


def test_a_folder_takes_what_is_text_and_says_what_is_not(tmp_path: Path) -> None:
    for name in ("a.txt", "b.rst", "c", "sub/d.TEX", ".git/e.txt", "sub/__pycache__/f.txt", ".g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "zeros").write_bytes(b"text\0more")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "x.jsonl").write_text("{}", encoding="utf-8")
    source = TextFiles(paths=[str(tmp_path)])
    assert [document.text for document in source.documents(ByteTokenizer())] == ["a.txt", "b.rst", "c", "sub/d.TEX"]
    assert skipped_sentence(source) == (
        "TextFiles: left out 1 empty (such as 'empty.txt'), 3 hidden (such as '.git'), "
        "1 of JSON lines, which a JsonLines source reads (such as 'x.jsonl'), "
        "2 that are not text (such as 'image.png')."
    )
    assert list(texts(tmp_path, suffixes=[".rst", ".TEX"])) == ["b.rst", "sub/d.TEX"]


def test_byte_order_marks_and_carriage_returns_are_dropped(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / encoding).write_bytes("né\r\nb\rc".encode(encoding))
    assert texts(tmp_path) == {"utf-8-sig": "né\nb\nc", "utf-16": "né\nb\nc"}


def test_symbolic_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("linked", encoding="utf-8")
    (tmp_path / "corpus" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "file.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    (tmp_path / "corpus" / "sub" / "loop").symlink_to(tmp_path / "corpus")
    assert texts(tmp_path / "corpus") == {"file.txt": "linked"}  # one file, under the first of its names
    (tmp_path / "corpus" / "file.txt").unlink()
    assert texts(tmp_path / "corpus") == {"folder/a.txt": "linked"}


def test_any_name_is_found_however_it_is_spelled(tmp_path: Path) -> None:
    names = ["with space", "br[ack]et", "star*", "new\nline", unicodedata.normalize("NFD", "é.txt"), "#%&.txt"]
    for name in names:
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / os.fsdecode(b"bytes\xff")).write_text("x", encoding="utf-8")
    found = texts(tmp_path)
    assert unicodedata.normalize("NFC", "é.txt") in found
    assert "bytes\\xff" in found
    assert len(found) == 7
    for name in [*names, unicodedata.normalize("NFC", "é.txt")]:
        assert len(texts(tmp_path / name)) == 1


def test_a_pattern_in_a_folder_with_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "my [old] texts"
    folder.mkdir()
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (folder / name).write_text(name, encoding="utf-8")
    assert list(texts(folder / "a[12].txt")) == ["a1.txt", "a2.txt"]
    assert list(texts(folder / "*1.txt")) == ["a1.txt", "b1.txt"]
    assert len(texts(tmp_path / "**" / "*.txt")) == 3


def test_a_pattern_is_relative_to_the_folder_before_it(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    absolute = list(texts(corpus / "**" / "*.py"))
    assert len(absolute) == 60
    assert list(texts("**/*.py")) == absolute


def test_a_file_of_two_paths_counts_once(corpus: Path) -> None:
    found = texts(corpus, corpus / "part0", corpus / "part0" / "*.py")
    assert len(found) == 61
    assert len(texts(corpus / "notes.md")) == 1


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "paths must be a list of at least one"),
        (["no/such/path"], "source 'no/such/path' does not exist; give a file"),
        (["no/such/*.py"], r"source 'no/such/\*.py' holds no file"),
    ],
)
def test_paths_that_hold_nothing_are_refused(paths: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^TextFiles: {message}"):
        read(TextFiles(paths=paths))


def test_what_is_named_must_be_text_and_what_begins_as_text_must_stay_so(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text; convert it or leave it out"):
        read(TextFiles(paths=[str(tmp_path / "bad.txt")]))
    (tmp_path / "long.txt").write_bytes(b"line\n" * 300_000 + b"\xff")
    with pytest.raises(ValueError, match="begins as text but is not UTF-8 text throughout"):
        "".join(read(TextFiles(paths=[str(tmp_path / "long.txt")]))["long.txt"].text)


def test_what_is_no_text_in_a_folder_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text", encoding="utf-8")
    (tmp_path / "late.txt").write_bytes(b"line\n" * 300_000 + b"\xff")
    (tmp_path / "nothing.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.txt")
    source = TextFiles(paths=[str(tmp_path)])
    assert list(read(source)) == ["good.txt"]
    said = str(skipped_sentence(source))
    assert "1 that are not text (such as 'late.txt')" in said
    assert "2 that are links to nothing, or no files" in said


def test_half_a_character_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^JsonLines: 'a\.jsonl:2' holds half a character \('\\ud800'\)"):
        read(JsonLines(paths=[str(tmp_path / "a.jsonl")]))


def test_a_long_file_is_read_in_parts(tmp_path: Path) -> None:
    text = "".join(f"{'é' * (number % 70)} {number}\n" for number in range(60_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    parts = list(read(TextFiles(paths=[str(tmp_path / "long.txt")]))["long.txt"].text)
    assert "".join(parts) == text
    assert max(map(len, parts)) < 200_000 < len(text)


def test_the_standard_library_is_a_source() -> None:
    source = StandardLibrary()
    names = {file.name for file in source.files()}
    assert {"typing.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or "/tests/" in name for name in names)
    assert source.size() > 5_000_000


def test_json_lines_are_texts_or_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\nb"}\n\n{"text": ""}\n{"text": [{"role": "user", "content": "?"}]}\n')
    source = JsonLines(paths=[str(tmp_path)])
    found = read(source)
    assert list(found) == ["x.jsonl:1", "x.jsonl:4"]
    assert found["x.jsonl:1"].text == "a\nb"
    assert found["x.jsonl:4"].messages == [{"role": "user", "content": "?"}]
    assert skipped_sentence(source) == "JsonLines: left out 1 empty (such as 'x.jsonl:3')."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of '.*x\.jsonl' is not JSON; give one object a line"),
        ('{"txt": "a", "id": 3}', r"'x.jsonl:2' has no field 'text' \(it has 'txt', 'id'\); name another field"),
        ("[3]", r"'x.jsonl:2' has no field 'text' \(it is no object\)"),
        ('{"text": 3}', r"field 'text' of 'x.jsonl:2' holds neither a text nor messages, but 3"),
    ],
)
def test_lines_that_are_no_documents_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read(JsonLines(paths=[str(path)]))


def test_token_files_are_documents(tmp_path: Path) -> None:
    write_documents(tmp_path / "x.bin", [[1, 2], [3]], vocab_size=256)
    found = read(TokenFiles(paths=[str(tmp_path)]))
    assert {name: document.tokens.tolist() for name, document in found.items()} == {"x.bin/0": [1, 2], "x.bin/1": [3]}
    write_documents(tmp_path / "x.bin", [[1, 2], [3]], vocab_size=9)
    with pytest.raises(ValueError, match="holds tokens of a vocabulary of 9, ByteTokenizer has 256; give"):
        read(TokenFiles(paths=[str(tmp_path)]))


def test_paths_stand_for_sources(tmp_path: Path) -> None:
    write_documents(tmp_path / "x.bin", [[1, 2]], vocab_size=256)
    (tmp_path / "x.jsonl").write_text('{"id": 1, "text": "a"}', encoding="utf-8")
    given = ["a.txt", "b", str(tmp_path / "x.bin"), "stdlib", str(tmp_path / "*.jsonl"), "c", TextFiles(paths=["d"])]
    made = sources_of("data", given)
    assert [type(source) for source in made] == [
        *(TextFiles, TokenFiles, StandardLibrary, JsonLines, TextFiles, TextFiles),
    ]
    assert [source.paths for source in made if isinstance(source, TextFiles)] == [["a.txt", "b"], ["c"], ["d"]]
    with pytest.raises(ValueError, match="data: sources must be a list of at least one source, file, folder"):
        sources_of("data", [])
    (tmp_path / "x.jsonl").write_text('{"body": "a"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"none of the fields text, messages, conversations \(it has 'body'\)"):
        sources_of("data", [str(tmp_path / "x.jsonl")])
