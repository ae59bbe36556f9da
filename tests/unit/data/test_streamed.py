"""Tokens in chunks of litdata: every row once an epoch, exact resume, any number of processes."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtp_modules.data.loaders import TrainLoader
from mtp_modules.data.rows import EpochOrder
from mtp_modules.data.streamed import StreamedDataModule, StreamedRows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")

ROW = 10


def write_chunks(path: Path) -> Path:
    """Write 600 tokens in chunks; token 0 ends a document."""
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(path), chunk_size=64, item_loader=TokensLoader())
    for number in range(60):
        writer[number] = torch.tensor([*range(1 + number, 10 + number), 0], dtype=torch.int32)
    writer.done()
    writer.merge()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("litdata")
    return write_chunks(tmp_path_factory.mktemp("tokens"))


def rows(folder: Path, **more: Any) -> StreamedRows:
    return StreamedRows(place=str(folder), window=8, lookahead=2, end_token=0, mixed_chunks=2, **more)


def test_every_row_comes_once_and_chunks_stay_together(folder: Path) -> None:
    data = rows(folder)
    order = data.epoch_ids(np.random.default_rng([0, 1]))
    assert sorted(order.tolist()) == data.fixed_ids().tolist() == list(range(data.num_rows))
    assert data.num_rows > 40
    np.testing.assert_array_equal(order, rows(folder).epoch_ids(np.random.default_rng([0, 1])))
    spread = np.ptp(order[:8])
    assert spread < data.num_rows  # rows of two chunks, not of all
    batch = data.batch(np.array([0, 3]))
    assert batch["tokens"].shape == (2, ROW)
    assert batch["tokens"][0].tolist() == [*range(1, 10), 0]


def test_an_end_token_ends_a_document(folder: Path) -> None:
    data = StreamedRows(place=str(folder), window=13, lookahead=2, end_token=0)
    batch = data.batch(np.array([0]))
    assert batch["document_ids"][0].tolist() == [0] * 10 + [1] * 5
    unmarked = StreamedRows(place=str(folder), window=13, lookahead=2, end_token=None)
    assert list(unmarked.batch(np.array([0]))) == ["tokens"]


def test_two_ranks_read_what_one_reads_and_resume_exactly(folder: Path) -> None:
    def loader(rank: int, world_size: int, batch_size: int) -> TrainLoader:
        order = EpochOrder(rows=rows(folder), seed=5)
        return TrainLoader(order=order, batch_size=batch_size, rank=rank, world_size=world_size)

    whole = [batch["tokens"] for batch in loader(0, 1, 4)]
    parts = zip(loader(0, 2, 2), loader(1, 2, 2), strict=True)
    for one, (first, second) in zip(whole, parts, strict=True):
        both = torch.cat([first["tokens"], second["tokens"]])
        assert sorted(one.tolist()) == sorted(both.tolist())
    interrupted = loader(1, 2, 2)
    begun = [batch["tokens"] for batch in itertools.islice(interrupted, 3)]
    resumed = loader(1, 2, 2)
    resumed.load_state_dict(interrupted.state_dict())
    left = [batch["tokens"] for batch in itertools.islice(resumed, len(resumed) - 3)]
    uninterrupted = [batch["tokens"] for batch in loader(1, 2, 2)]
    assert torch.equal(torch.stack([*begun, *left]), torch.stack(uninterrupted))


def test_a_data_module_with_workers(folder: Path) -> None:
    plain, working = (
        StreamedDataModule(train=str(folder), val=str(folder), window=8, lookahead=2, batch_size=4, num_workers=workers)
        for workers in (0, 1)
    )
    for mine, theirs in zip(plain.train_dataloader(), working.train_dataloader(), strict=True):
        assert torch.equal(mine["tokens"], theirs["tokens"])
    assert plain.test_dataloader() == []
    assert sum(len(batch["tokens"]) for batch in plain.val_dataloader()) == plain.rows("val").num_rows


def test_places_without_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^StreamedRows: '.*gone' holds no tokens .* write them by litdata\.optimize"):
        StreamedRows(place=str(tmp_path / "gone"), window=8, lookahead=2, end_token=0)
    with pytest.raises(ValueError, match="has no chunk with 802 tokens; give more text, or a smaller window"):
        StreamedRows(place=str(folder), window=800, lookahead=2, end_token=0)
