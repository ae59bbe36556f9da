"""Tokens on disk are those in memory, built once whatever interrupts it, and found again by content and tokenizer."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_modules.core.tokenizer import Tokenizer
from mtp_modules.data import ByteTokenizer, Document, TextDataModule, TextFiles, WordTokenizer, shards
from mtp_modules.data.corpus import SHARED, Sources, read_streams
from mtp_modules.data.sharded_array import ShardedArray
from mtp_modules.data.shards import cached_streams
from tests.command_line import run

SHARES = {"val_share": 0.2, "test_share": 0.1}
COUNTED: list[int] = []


class CountingTokenizer(ByteTokenizer):
    """Counts the texts that it encodes."""

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        COUNTED.append(sum(map(len, texts)))
        return super().encode_batch(texts)


class Interrupted(TextFiles):
    """Text files, of which one interrupts the process."""

    def __init__(self, *, paths: list[str], after: int) -> None:
        super().__init__(paths=paths)
        self.after = after

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        for number, document in enumerate(super().documents(tokenizer)):
            if number == self.after:
                raise KeyboardInterrupt
            yield document


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SEGMENT", 300)
    monkeypatch.setattr("mtp_modules.data.encoding._BATCH", 150)


def assert_same(sources: Sources, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    cached = cached_streams(folder, sources, tokenizer, **SHARES)
    kept = read_streams(sources, tokenizer, **SHARES)
    assert list(cached) == list(kept)
    for split, stream in kept.items():
        np.testing.assert_array_equal(cached[split].tokens[: len(cached[split].tokens)], stream.tokens)
        np.testing.assert_array_equal(cached[split].document_starts, stream.document_starts)
        np.testing.assert_array_equal(cached[split].hashes, stream.hashes)
        assert tuple(cached[split].names) == stream.names
        assert cached[split].digest() == stream.digest()  # so a run resumes exactly with and without a cache
        assert (cached[split].loss_mask is None) == (stream.loss_mask is None)


@pytest.mark.usefixtures("small_segments")
def test_tokens_on_disk_are_those_in_memory(corpus: Path, tmp_path: Path) -> None:
    sources = {SHARED: [TextFiles(paths=[str(corpus)])]}
    assert_same(sources, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").glob("*/index.json")
    assert json.loads(entry.read_text())["segments"] > 5
    (tmp_path / "one.txt").write_text("a single text\n" * 400, encoding="utf-8")
    assert_same({SHARED: [TextFiles(paths=[str(tmp_path / "one.txt")])]}, tmp_path / "cache")


@pytest.mark.usefixtures("small_segments")
def test_an_interrupted_build_goes_on(corpus: Path, tmp_path: Path) -> None:
    paths, tokenizer = [str(corpus)], CountingTokenizer()
    reference = TextFiles(paths=paths)
    key = shards.cache_key
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "cache_key", lambda sources, *rest: key({SHARED: [reference]}, *rest))
        for after in (25, 50):
            with pytest.raises(KeyboardInterrupt):
                cached_streams(tmp_path, {SHARED: [Interrupted(paths=paths, after=after)]}, tokenizer, **SHARES)
    (partial,) = tmp_path.glob("*.partial")
    done = json.loads((partial / "progress.json").read_text().splitlines()[1])["pieces"]
    assert 30 < done <= 50
    COUNTED.clear()
    cached_streams(tmp_path, {SHARED: [reference]}, tokenizer, **SHARES)
    texts = [document.text for document in reference.documents(tokenizer)]
    assert sum(COUNTED) == sum(map(len, texts[done:]))
    assert_same({SHARED: [reference]}, tmp_path, tokenizer)
    assert not list(tmp_path.glob("*.partial"))


def test_the_cache_is_keyed_by_content_and_tokenizer(corpus: Path, tmp_path: Path) -> None:
    def entries() -> int:
        return len(list((tmp_path / "cache").glob("*/index.json")))

    tokenizer, source = CountingTokenizer(), TextFiles(paths=[str(corpus)])

    def build(used: Tokenizer = tokenizer, **shares: float) -> None:
        cached_streams(tmp_path / "cache", {SHARED: [source]}, used, **(SHARES | shares))

    build()
    COUNTED.clear()
    build()
    assert (entries(), COUNTED) == (1, [])
    (corpus / "notes.md").touch()  # another time, the same content
    build()
    assert (entries(), COUNTED) == (1, [])
    (corpus / "notes.md").write_text("other", encoding="utf-8")
    build()
    assert entries() == 2
    build(ByteTokenizer())
    build(val_share=0.3)
    assert entries() == 4


def test_loss_masks_and_windows_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Masked(TextFiles):
        def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
            for document in super().documents(tokenizer):
                tokens = np.arange(40)
                masked = document.name == "b.txt"
                yield Document(document.name, tokens=tokens, loss_mask=tokens % 2 == 0 if masked else None)

    monkeypatch.setattr(shards, "SEGMENT", 30)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    source = Masked(paths=[str(tmp_path / "*.txt")])
    assert_same({"train": [source]}, tmp_path / "cache")
    kept, cached = (
        TextDataModule(train=[source], window=8, lookahead=2, batch_size=4, cache=cache, num_workers=workers)
        for cache, workers in ((None, 0), (str(tmp_path / "cache"), 1))
    )
    for mine, theirs in zip(kept.train_dataloader(), cached.train_dataloader(), strict=True):
        assert mine.keys() == theirs.keys() >= {"tokens", "loss_mask"}
        assert all((mine[name] == theirs[name]).all() for name in mine)


def test_files_are_read_like_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.arange(100, dtype=np.uint16)
    paths = [tmp_path / name for name in "abc"]
    for path, part in zip(paths, np.split(numbers, [30, 30]), strict=True):
        part.tofile(path)
    monkeypatch.setattr("mtp_modules.data.sharded_array._LONG", 50)
    array = ShardedArray(paths, np.uint16)
    again = pickle.loads(pickle.dumps(array))
    assert len(pickle.dumps(array)) < 600
    for read in (array, again):
        np.testing.assert_array_equal(read[np.array([[0, 29], [30, -1]])], [[0, 29], [30, 99]])
        np.testing.assert_array_equal(read[25:35], numbers[25:35])
        inner = read[20:90]
        assert isinstance(inner, ShardedArray)
        assert (len(inner), inner[0], inner[-1]) == (70, 20, 89)
        np.testing.assert_array_equal(inner[5:15], numbers[25:35])


def test_prepare_makes_the_cache_of_a_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    arguments = {"sources": [str(corpus)], "window": 8, "batch_size": 2, "val_share": 0.2, "test_share": 0.2}
    config.write_text(json.dumps({"data": {"class_path": "TextDataModule", "init_args": arguments}}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"error: cache: .*config\.yaml names none; give cache, a folder"):
        run("prepare", str(config))
    run("prepare", str(config), "--cache", str(tmp_path / "cache"))
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == ["train", "val", "test"]
    data = TextDataModule(**arguments, lookahead=2, cache=str(tmp_path / "cache"))
    assert told[0].startswith(f"train: {len(data.rows('train').stream.tokens)} tokens of ")


def test_processes_that_begin_together_build_once(corpus: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mtp_modules.data import ByteTokenizer, TextFiles\n"
        "from mtp_modules.data.shards import cached_streams\n"
        "told = []\n"
        "source = TextFiles(paths=[sys.argv[1]])\n"
        "streams = cached_streams(Path(sys.argv[2]), {'sources': [source]}, ByteTokenizer(), val_share=0.2, "
        "test_share=0.2, progress=lambda done, total: told.append(done))\n"
        "print(streams['train'].digest(), bool(told))"
    )
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=100)[0].split() for process in running]
    assert said[0][0] == said[1][0]
    assert sorted(built for _, built in said) == ["False", "True"]


def test_a_damaged_index_is_a_sentence(corpus: Path, tmp_path: Path) -> None:
    sources = {SHARED: [TextFiles(paths=[str(corpus)])]}
    cached_streams(tmp_path / "cache", sources, ByteTokenizer(), **SHARES)
    (index,) = (tmp_path / "cache").glob("*/index.json")
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is damaged .*; remove .*, and it is built again"):
        cached_streams(tmp_path / "cache", sources, ByteTokenizer(), **SHARES)
    with pytest.raises(ValueError, match="WordTokenizer: the word 'no' is unknown"):
        cached_streams(tmp_path / "cache", sources, WordTokenizer(words=["a"]), **SHARES)


def read_all(folder: Path, sources: Sources) -> None:
    for stream in cached_streams(folder, sources, ByteTokenizer(), **SHARES).values():
        assert len(stream.tokens[np.arange(len(stream.tokens))])
        assert stream.names[0]


@pytest.mark.usefixtures("small_segments")
def test_a_flipped_bit_is_never_trained_on(corpus: Path, tmp_path: Path) -> None:
    """Each file is checked when something of it is read, so that opening a large cache takes no time."""
    sources = {SHARED: [TextFiles(paths=[str(corpus)])]}
    cached_streams(tmp_path / "cache", sources, ByteTokenizer(), **SHARES)
    (entry,) = (tmp_path / "cache").glob("*/")
    last = {path.suffix: path for path in sorted(entry.iterdir()) if path.stat().st_size}
    assert last.keys() == {".tokens", ".starts", ".hashes", ".names", ".json", ".txt"}
    for path in (last[kind] for kind in last if kind != ".txt"):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(good) // 2] ^= 4
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"^cache: {path} is damaged .*; remove {entry}, and it is built again"):
            read_all(tmp_path / "cache", sources)
        path.write_bytes(good)
    assert_same(sources, tmp_path / "cache")


def built(tmp_path: Path) -> tuple[Sources, Path]:
    """Build a cache of chats, which have loss masks, in several segments; return its sources and its entry."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 50, encoding="utf-8")
    sources = {"train": [Masked(paths=[str(tmp_path / "*.txt")])]}
    cached_streams(tmp_path / "cache", sources, ByteTokenizer(), val_share=0.0, test_share=0.0)
    (entry,) = (tmp_path / "cache").glob("*/")
    return sources, entry


class Masked(TextFiles):
    """Documents of 400 tokens, half of which are trained on."""

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        for document in super().documents(tokenizer):
            yield Document(document.name, tokens=np.arange(400) % 99, loss_mask=np.arange(400) % 2 == 0)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
def test_a_file_that_is_missing_or_empty_is_a_sentence(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    sources, entry = built(tmp_path)
    for path in sorted(entry.iterdir()):
        good = path.read_bytes()
        if not good:
            continue  # a segment in which no document begins
        damage(path)
        if path.name == "index.json" and not path.is_file():  # there is no entry, and it is built
            assert cached_streams(tmp_path / "cache", sources, ByteTokenizer(), val_share=0.0, test_share=0.0)
            continue
        with pytest.raises(ValueError, match=r"^cache: .* is damaged .*; remove .*, and it is built again"):
            cached_streams(tmp_path / "cache", sources, ByteTokenizer(), val_share=0.0, test_share=0.0)
        path.write_bytes(good)
    assert entry.is_dir()


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train.00001.tokens").unlink(),
        lambda folder: (folder / "train.00000.mask").write_bytes(b""),
        lambda folder: (folder / "train.00000.starts").write_bytes(b"\1" * 8),
        lambda folder: (folder / "progress.json").write_text("[]"),
        lambda folder: (folder / "progress.json").write_text("{}"),
        lambda folder: (folder / "progress.json").write_text(
            (folder / "progress.json").read_text().replace('"pieces": ', '"pieces": 1')  # more than were read
        ),
        lambda folder: (folder / "segment.00001.json").write_text("[]"),
    ],
)
def test_what_is_damaged_in_a_build_that_stopped_is_built_again(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    sources, entry = built(tmp_path)
    wanted = {path.name: path.read_bytes() for path in entry.iterdir()}
    shutil.rmtree(entry)
    write = shards._write_segment
    with pytest.MonkeyPatch.context() as patched:

        def stop(folder: Path, state: dict[str, Any], buffers: Any) -> None:
            write(folder, state, buffers)
            if state["segments"] == 2:
                raise KeyboardInterrupt

        patched.setattr(shards, "_write_segment", stop)
        with pytest.raises(KeyboardInterrupt):
            cached_streams(tmp_path / "cache", sources, ByteTokenizer(), val_share=0.0, test_share=0.0)
    (partial,) = (tmp_path / "cache").glob("*.partial")
    damage(partial)
    (tmp_path / "cache" / "files.json").write_text("[1]", encoding="utf-8")
    cached_streams(tmp_path / "cache", sources, ByteTokenizer(), val_share=0.0, test_share=0.0)
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == wanted


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before", encoding="utf-8")
    sources = {"train": [TextFiles(paths=[str(path)])]}

    def text() -> str:
        streams = cached_streams(tmp_path / "cache", sources, ByteTokenizer(), val_share=0.0, test_share=0.0)
        return ByteTokenizer().decode(streams["train"].tokens[:5].tolist())

    assert text() == "befor"
    times = path.stat()
    path.write_text("behind", encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert text() == "behin"
