"""The acceptance rule against a loop."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.decoders.verification.functional import accept_greedy
from tests.reference.decoding import count_accepted


@given(data=st.data(), rows=st.integers(1, 4), num_drafts=st.integers(0, 5))
def test_accept_greedy_equals_a_loop(data: st.DataObject, rows: int, num_drafts: int) -> None:
    def tokens(columns: int) -> list[list[int]]:
        row = st.lists(st.integers(0, 1), min_size=columns, max_size=columns)
        return data.draw(st.lists(row, min_size=rows, max_size=rows))

    drafts, choices = tokens(num_drafts), tokens(num_drafts + 1)
    accepted = accept_greedy(torch.tensor(drafts).long(), torch.tensor(choices))
    assert accepted.tolist() == [count_accepted(*row) for row in zip(drafts, choices, strict=True)]
