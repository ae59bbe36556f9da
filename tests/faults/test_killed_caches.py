"""SIGKILL while text is tokenised into a cache."""

import json
import random
import time
from pathlib import Path
from unittest import mock

from mtp_modules.core.checksums import damaged_file
from mtp_modules.data import ByteTokenizer, TextFiles, shards
from mtp_modules.data.shards import cached_streams
from tests.faults.processes import give_up_capabilities, started, times


def build(folder: Path, pause: float = 0.0) -> dict[str, bytes]:
    """Build a cache in small segments, and return the digest of each split."""
    write = shards._write_segment

    def slowly(*arguments: object) -> None:
        time.sleep(pause)
        write(*arguments)

    source = TextFiles(paths=[str(folder / "text")])
    with (
        mock.patch.multiple(shards, SEGMENT=2000, _write_segment=slowly),
        mock.patch("mtp_modules.data.encoding._BATCH", 500),
    ):
        streams = cached_streams(
            folder / "cache", {"sources": [source]}, ByteTokenizer(), val_share=0.2, test_share=0.1
        )
    return {split: stream.digest() for split, stream in streams.items()}


def test_a_killed_build_goes_on_and_ends_with_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(100):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} is a number.\n" * 20, encoding="utf-8")
    wanted = build(tmp_path)
    dice, reached, rounds = random.Random(0), [], 0
    for _ in range(times(1, 10)):
        (tmp_path / "cache").rename(tmp_path / f"whole-{rounds}")
        while not list((tmp_path / "cache").glob("*/index.json")):
            process = started(build, tmp_path, 0.03)
            process.join(0.2 + 0.4 * dice.random())
            process.kill()
            process.join()
            reached += [int(path.name.split(".")[1]) for path in (tmp_path / "cache").glob("*.partial/train.*.tokens")]
            rounds += 1
            assert rounds < 1000
        assert build(tmp_path) == wanted
        (entry,) = (tmp_path / "cache").glob("*/index.json")
        assert damaged_file(entry.parent) is None
        assert not list((tmp_path / "cache").glob("*.partial"))
    assert len(set(reached)) > 3, reached


def test_a_cache_that_can_only_be_read_serves_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} is a number.\n", encoding="utf-8")
    wanted = build(tmp_path)
    process = started(_read_only, tmp_path)
    process.join(60)
    held, said = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert held == wanted
    assert said.startswith(f"cache: {tmp_path / 'cache'} cannot be written to (Permission denied).")


def _read_only(folder: Path) -> None:
    give_up_capabilities()
    (folder / "cache").chmod(0o555)
    held = build(folder)
    (folder / "text" / "new.txt").write_text("More.\n" * 20, encoding="utf-8")
    try:
        build(folder)
    except ValueError as error:
        (folder / "said.json").write_text(json.dumps([held, str(error)]), encoding="utf-8")
    (folder / "cache").chmod(0o755)
