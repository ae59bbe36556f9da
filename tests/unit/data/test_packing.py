"""Rows of whole documents hold every token once, and leave little room."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.core.targets import future_targets
from mtp_modules.data import PackedRows, TokenStream
from mtp_modules.data.packing import best_fit


def stream(lengths: list[int]) -> TokenStream:
    total = np.array(lengths, dtype=np.int64)
    tokens = 1 + np.arange(total.sum(), dtype=np.uint32)
    return TokenStream(tokens, total.cumsum() - total, tuple(map(str, lengths)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_rows_hold_all_pieces_and_never_too_many(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths), 9)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 9
    assert (filled > 0).all()
    assert np.sort(filled)[:2].sum() > 9 or len(filled) == 1  # two rows that fit into one would be one


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_every_token_but_the_first_is_a_target_of_horizon_1_once(lengths: list[int]) -> None:
    given_stream = stream(lengths)
    rows = PackedRows(stream=given_stream, window=8, lookahead=3)
    batch = rows.batch(rows.fixed_ids())
    targets, valid = future_targets(batch["tokens"], (1, 3), batch["document_ids"], batch["loss_mask"])
    learned = sorted(targets[..., 0][valid[..., 0]].tolist())
    firsts = set((1 + given_stream.document_starts).tolist())
    assert learned == [token for token in range(1, 1 + sum(lengths)) if token not in firsts]


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="PackedRows: the text has 0 tokens; give more text"):
        PackedRows(stream=stream([]), window=8, lookahead=2)
