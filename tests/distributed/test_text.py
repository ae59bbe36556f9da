"""Two ranks read each row of text on disk once, whichever of them made the cache."""

from pathlib import Path

import pytest

from mtp_modules.data import TextDataModule
from mtp_modules.data.streamed import StreamedRows
from tests.distributed import text
from tests.distributed.ranks import run_ranks
from tests.unit.data.test_streamed import write_chunks


def test_two_ranks_share_a_cache(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}, " * 20, encoding="utf-8")
    (first, ones), (second, others) = run_ranks(text.cached, tmp_path / "texts", tmp_path / "cache")
    alone = TextDataModule(train=[str(tmp_path / "texts")], window=16, lookahead=2, batch_size=4)
    assert first == second == alone.training_rows().digest()
    alone.seed = 3
    rows = [row for batch in alone.train_dataloader() for row in batch["tokens"].tolist()]
    assert sorted(ones + others) == sorted(rows)


def test_two_ranks_read_each_streamed_row_once(tmp_path: Path) -> None:
    pytest.importorskip("litdata")
    (count, ones), (_, others) = run_ranks(text.streamed, write_chunks(tmp_path / "tokens"))
    alone = StreamedRows(place=str(tmp_path / "tokens"), window=8, lookahead=2, end_token=0)
    assert count == alone.num_rows
    known = {tuple(row) for row in alone.batch(alone.fixed_ids())["tokens"].tolist()}
    assert len(ones) == len(others) == count // 4 * 2
    assert {tuple(row) for row in ones + others} <= known
    assert len({tuple(row) for row in ones + others}) == len(ones + others)
