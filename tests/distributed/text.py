"""What each rank reads of text on disk."""

from pathlib import Path
from typing import Any

from torch import distributed as dist

from mtp_modules.data import TextDataModule
from mtp_modules.data.loaders import TrainLoader
from mtp_modules.data.rows import EpochOrder, TokenRows
from mtp_modules.data.streamed import StreamedRows


def _batches(rows: TokenRows) -> list[list[int]]:
    order = EpochOrder(rows=rows, seed=3)
    loader = TrainLoader(order=order, batch_size=2, rank=dist.get_rank(), world_size=dist.get_world_size())
    return [row for batch in loader for row in batch["tokens"].tolist()]


def cached(corpus: Path, cache: Path) -> tuple[str, list[list[int]]]:
    """Return digest and rows of text whose cache both ranks ask for at once."""
    data = TextDataModule(train=[str(corpus)], window=16, lookahead=2, batch_size=2, cache=str(cache))
    data.setup()
    return data.training_rows().digest(), _batches(data.training_rows())


def streamed(folder: Path) -> tuple[int, list[list[int]]]:
    """Return number and rows of tokens in chunks."""
    rows: Any = StreamedRows(place=str(folder), window=8, lookahead=2, end_token=0)
    return rows.num_rows, _batches(rows)
