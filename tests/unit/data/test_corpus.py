"""Documents are split by name or content alone, cut inside a single one, and encoded without loss."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers

from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data import (
    ByteTokenizer,
    Document,
    DocumentSource,
    HuggingFaceTokenizer,
    JsonLines,
    TextDataModule,
    TextFiles,
    TokenStream,
    load_splits,
)
from mtp_modules.data.corpus import SHARED, SPLITS, read_streams, said_of, split_of
from mtp_modules.data.documents import FileHash


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


class Given(DocumentSource):
    """Documents from a list."""

    def __init__(self, *documents: Document) -> None:
        self.given = documents

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        yield from self.given

    def fingerprint(self, hash_file: FileHash) -> str:
        return str(self.given)


def whole(*sources: DocumentSource | str, tokenizer: Tokenizer | None = None) -> TokenStream:
    return load_splits(sources, tokenizer or ByteTokenizer(), val_share=0.0, test_share=0.0)["train"]


def test_the_split_is_the_same_on_another_machine(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(corpus, copy)
    here, there = (load_splits([str(root)], ByteTokenizer(), val_share=0.2, test_share=0.2) for root in (corpus, copy))
    assert list(here) == list(SPLITS)
    for split in SPLITS:
        assert here[split].names == there[split].names
    assert sum(len(stream.names) for stream in here.values()) == 61


def test_the_split_is_pinned() -> None:
    """A change here moves files between the sides of every run that exists."""
    names = [f"file{number}.py" for number in range(12)]
    sides = " ".join(split_of(name, val_share=0.3, test_share=0.3)[:2] for name in names)
    assert sides == "tr tr te tr te tr te tr te tr te tr"
    many = [split_of(f"{number}", val_share=0.05, test_share=0.1) for number in range(20_000)]
    assert many.count("val") / 20_000 == pytest.approx(0.05, abs=0.006)
    assert many.count("test") / 20_000 == pytest.approx(0.1, abs=0.008)


def test_a_share_of_zero_leaves_the_side_out(corpus: Path) -> None:
    assert list(load_splits([str(corpus)], ByteTokenizer(), val_share=0.0, test_share=0.0)) == ["train"]


def test_a_share_for_training_moves_no_document_of_the_other_splits(corpus: Path) -> None:
    whole = load_splits([str(corpus)], ByteTokenizer(), val_share=0.2, test_share=0.2)
    sources = {SHARED: [TextFiles(paths=[str(corpus)])], "train": [Given(Document("own", text="x"))]}
    for train_share, kept in ((0.6, whole["train"].names), (0.3, None), (0.0, ())):
        streams = read_streams(sources, ByteTokenizer(), val_share=0.2, test_share=0.2, train_share=train_share)
        assert [streams[split].names for split in ("val", "test")] == [whole[split].names for split in ("val", "test")]
        *names, own = streams["train"].names
        assert own == "own"
        assert set(names) <= set(whole["train"].names)
        assert len(names) < len(whole["train"].names) if kept is None else tuple(names) == tuple(kept)


def test_streams_hold_every_document_and_its_end(corpus: Path) -> None:
    tokenizer = ByteTokenizer()
    source = TextFiles(paths=[str(corpus)])
    stream = whole(source)
    assert stream.tokens.dtype == np.uint16
    texts = tokenizer.decode(stream.tokens.tolist()).split("\0")
    assert texts == [document.text for document in source.documents(tokenizer)] + [""]
    assert [texts[0], texts[1]] == [
        tokenizer.decode(stream.tokens[start : end - 1].tolist())
        for start, end in zip(stream.document_starts[:2], stream.document_starts[1:3], strict=True)
    ]
    assert stream.names == tuple(document.name for document in source.documents(tokenizer))


def test_large_vocabularies_and_tokenizers_without_an_end() -> None:
    source = Given(Document("a", text="a bb ccc"), Document("b", text="dddd"), Document("empty", text=""))
    stream = whole(source, tokenizer=Words(size=2**16 + 1))
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens.tolist() == [1, 2, 3, 4]
    assert stream.document_starts.tolist() == [0, 3]
    assert whole(source, tokenizer=Words(size=9, end=8)).tokens.tolist() == [1, 2, 3, 8, 4, 8]
    with pytest.raises(ValueError, match=r"Words gave 'a' a token outside 0..2"):
        whole(source, tokenizer=Words(size=3))


def test_tokens_and_their_mask_are_taken_as_they_are() -> None:
    tokens, mask = np.array([5, 6, 7]), np.array([False, True, True])
    stream = whole(Given(Document("text", text="ab"), Document("ids", tokens=tokens, loss_mask=mask)))
    assert stream.tokens.tolist() == [97, 98, 0, 5, 6, 7]
    assert stream.loss_mask.tolist() == [True, True, True, False, True, True]
    with pytest.raises(ValueError, match=r"^documents: 'x' has 3 tokens and 2 values of loss_mask\.$"):
        whole(Given(Document("x", tokens=tokens, loss_mask=mask[:2])))
    with pytest.raises(ValueError, match=r"'x' has a token outside 0..255; give the tokenizer it was encoded with"):
        whole(Given(Document("x", tokens=tokens + 250)))
    with pytest.raises(ValueError, match=r"'x' holds messages, .* put its source into a Chat source"):
        whole(Given(Document("x", messages=[{"role": "user", "content": "?"}])))


def test_digest_follows_tokens_and_boundaries() -> None:
    first = whole(Given(Document("a", text="abc"), Document("b", text="d")))
    assert first.digest() == whole(Given(Document("x", text="abc"), Document("b", text="d"))).digest()
    assert first.digest() != whole(Given(Document("a", text="abd"), Document("b", text="d"))).digest()
    assert first.digest() != whole(Given(Document("a", text="abc\0d"))).digest()


def test_a_side_without_a_document_is_refused_with_the_way_out() -> None:
    names = [name for name in map(str, range(99)) if split_of(name, val_share=0.05, test_share=0.05) == "train"]
    some = Given(*(Document(name, text="x") for name in names[:3]))
    with pytest.raises(ValueError, match="the val split got none of the 3 documents; add documents, raise val_share, "):
        load_splits([some], ByteTokenizer())
    none = Given(
        *(Document(name, text="x") for name in "012345678" if split_of(name, val_share=0.9, test_share=0) != "train")
    )
    with pytest.raises(ValueError, match=r"the train split got none of the .* add documents, lower the other shares"):
        load_splits([none], ByteTokenizer(), val_share=0.9, test_share=0.0)


@pytest.mark.parametrize(("val_share", "test_share"), [(0.5, 0.5), (1.0, 0.0)])
def test_shares_that_leave_no_training_are_refused(val_share: float, test_share: float) -> None:
    with pytest.raises(ValueError, match=r"val_share \+ test_share must be below 1"):
        load_splits(["stdlib"], ByteTokenizer(), val_share=val_share, test_share=test_share)


def test_shares_that_overlap_or_leave_no_training_are_refused() -> None:
    wrong = r"train_share \+ val_share \+ test_share must be at most 1, got 0\.95 \+ 0\.05 \+ 0\.05; lower one"
    with pytest.raises(ValueError, match=wrong):
        TextDataModule(sources=["stdlib"], window=8, lookahead=1, batch_size=1, train_share=0.95)
    with pytest.raises(ValueError, match="there is nothing to train on; give sources, or train"):
        TextDataModule(sources=["stdlib"], window=8, lookahead=1, batch_size=1, train_share=0.0)


def test_a_single_text_is_cut_at_line_starts(tmp_path: Path) -> None:
    lines = [f"line {number} of a story\n" for number in range(1000)]
    (tmp_path / "input.txt").write_text("".join(lines), encoding="utf-8")
    streams = load_splits([str(tmp_path / "input.txt")], ByteTokenizer(), val_share=0.1, test_share=0.2)
    texts = [ByteTokenizer().decode(stream.tokens.tolist()) for stream in streams.values()]
    assert "".join(texts) == "".join(lines) + "\0"
    assert all(text.startswith("line ") for text in texts)
    shares = [len(text) / sum(map(len, texts)) for text in texts]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.002)
    assert len({stream.digest() for stream in streams.values()}) == 3


def test_sources_of_their_own_and_shares_of_the_rest(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out", encoding="utf-8")
    shared, own = TextFiles(paths=[str(corpus)]), TextFiles(paths=[str(tmp_path / "held.txt")])
    streams = read_streams({SHARED: [shared], "val": [own]}, ByteTokenizer(), val_share=0.3, test_share=0.3)
    assert streams["val"].names == ("held.txt",)
    assert len(streams["train"].names) + len(streams["test"].names) == 61
    only = read_streams({"train": [shared], "test": [own]}, ByteTokenizer(), val_share=0.3, test_share=0.3)
    assert {split: len(stream.names) for split, stream in only.items()} == {"train": 61, "test": 1}


def test_documents_of_two_splits_are_counted_and_named(tmp_path: Path) -> None:
    for name, texts in {"a": ["once", "twice", "three"], "b": ["three", "four", "once"]}.items():
        for number, text in enumerate(texts):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{name}{number}.txt").write_text(text, encoding="utf-8")
    sources = {"train": [TextFiles(paths=[str(tmp_path / "a")])], "val": [TextFiles(paths=[str(tmp_path / "b")])]}
    streams = read_streams(sources, ByteTokenizer(), val_share=0.0, test_share=0.0)
    assert said_of(sources.values(), streams) == [
        "2 of the 3 documents of the val split are also in the train split, such as 'b0.txt', which equals 'a2.txt'."
    ]


def test_equal_records_are_in_one_split(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"record {number % 50}"}) for number in range(200)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    streams = load_splits(
        [JsonLines(paths=[str(tmp_path / "x.jsonl")])], ByteTokenizer(), val_share=0.3, test_share=0.3
    )
    assert sum(len(stream.names) for stream in streams.values()) == 200
    assert all(len(set(stream.hashes.tolist())) == len(stream.names) // 4 for stream in streams.values())
    assert said_of([], streams) == []


def test_a_long_text_is_encoded_in_parts_as_if_it_were_whole() -> None:
    line = "parts are joined; nothing is lost   at a cut\n"
    texts = {"lines": line * 9000, "blank": (line + "\n \n") * 9000, "one": "x" * 400_000, "words": "ab cd " * 70_000}
    stream = whole(Given(*(Document(name, text=text) for name, text in texts.items())))
    assert ByteTokenizer().decode(stream.tokens.tolist()) == "".join(text + "\0" for text in texts.values())
    assert stream.names == tuple(texts)
    fast = FastTokenizer(models.BPE(vocab={"▁": 0, "a": 1, "a▁": 2, "\n": 3}, merges=[("a", "▁")]))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    across = whole(
        Given(Document("a", text="a " * 150_000)), tokenizer=HuggingFaceTokenizer(tokenizer_json=fast.to_str())
    )
    pieces = "".join(["▁", "a", "a▁", "\n"][token] for token in across.tokens.tolist())
    assert pieces == "▁" + "a▁" * 150_000  # one space in front of all, and none at the cuts, which tokens span
    words = Words(size=60, end=59)
    cut = whole(Given(Document("words", text=texts["words"])), tokenizer=words)
    assert cut.tokens.tolist() == [*words.encode(texts["words"]), 59]
