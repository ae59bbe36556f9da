"""Windows tile the stream, carry their lookahead, and say where documents meet."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mtp_modules.core.targets import future_targets
from mtp_modules.data import TokenStream, WindowDataset


def stream(length: int, starts: tuple[int, ...] = (0,)) -> TokenStream:
    tokens = np.arange(length, dtype=np.uint16)
    return TokenStream(tokens, np.array(starts, dtype=np.int64), tuple(str(start) for start in starts))


@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 60), st.integers(0, 99))
def test_an_epoch_tiles_the_stream(window: int, lookahead: int, slack: int, seed: int) -> None:
    lookahead = min(lookahead, window - 1)
    rows = WindowDataset(stream=stream(window + lookahead + slack), window=window, lookahead=lookahead)
    ids = np.sort(rows.epoch_ids(np.random.default_rng(seed)))
    assert len(ids) == rows.num_rows >= 1
    assert (np.diff(ids) == window).all()
    assert 0 <= ids[0] < window
    assert ids[-1] + window + lookahead <= len(rows.stream.tokens)
    assert len(rows.stream.tokens) - lookahead - len(ids) * window < 2 * window  # nearly all of it is read
    tokens = rows.batch(ids)["tokens"]
    assert tokens.tolist() == [list(range(start, start + window + lookahead)) for start in ids]


def test_every_phase_is_drawn() -> None:
    rows = WindowDataset(stream=stream(50), window=5, lookahead=2)
    phases = {int(rows.epoch_ids(np.random.default_rng([0, epoch])).min()) for epoch in range(99)}
    assert phases == {0, 1, 2, 3, 4}


def test_evaluation_tiles_from_the_beginning() -> None:
    rows = WindowDataset(stream=stream(21), window=5, lookahead=1)
    assert rows.fixed_ids().tolist() == [0, 5, 10, 15]
    assert len(WindowDataset(stream=stream(20), window=5, lookahead=1)) == 3


def test_document_ids_come_only_where_documents_meet() -> None:
    rows = WindowDataset(stream=stream(40, (0, 7, 8, 30)), window=5, lookahead=1)
    assert list(rows.batch(np.array([9, 20]))) == ["tokens"]
    batch = rows.batch(np.array([4, 20]))
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 2, 2], [2] * 6]
    assert batch["tokens"].dtype == batch["document_ids"].dtype == torch.int64
    _, valid = future_targets(batch["tokens"], (1,), batch["document_ids"])
    assert valid[0, :, 0].tolist() == [True, True, False, False, True]


def test_as_a_plain_data_set() -> None:
    rows = WindowDataset(stream=stream(41, (0, 7)), window=5, lookahead=1)
    batches = list(DataLoader(rows, batch_size=4))
    assert len(rows) == 8
    assert [batch["tokens"].shape for batch in batches] == [(4, 6), (4, 6)]
    assert batches[0]["document_ids"][1].tolist() == [0, 0, 1, 1, 1, 1]
    assert len(list(rows)) == 8


def test_short_text_is_refused_with_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"the val text has 9 tokens, a row needs window \+ lookahead = 8 \+ 2"):
        WindowDataset(stream=stream(9), window=8, lookahead=2, name="val text")
    with pytest.raises(ValueError, match="has 0 tokens"):
        WindowDataset(stream=stream(0), window=8, lookahead=2)


@pytest.mark.parametrize(
    ("window", "lookahead", "message"),
    [
        (0, 1, "window must be at least 1, got 0"),
        (4, 0, "lookahead must be at least 1, got 0"),
        (4, 4, "the largest horizon must be below the window, got lookahead 4 and window 4"),
    ],
)
def test_senseless_sizes_are_refused(window: int, lookahead: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowDataset(stream=stream(40), window=window, lookahead=lookahead)
