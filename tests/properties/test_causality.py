"""No prediction depends on its target or on anything later, and no document on another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import MTPModel, MultiTokenLoss
from mtp_modules.core.targets import sample_positions
from tests.helpers import TRUNKS, TRUNKS_WITH_HEADS, assert_same, gradients, make_model, make_trunk, random_tokens
from tests.reference import transformer as naive

LENGTH = 7
HORIZONS = 3


def last_reached(model: MTPModel, horizon: int) -> int:
    """How many tokens beyond its position a horizon may read."""
    return horizon - 1 if model.heads.reads_future else 0


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@pytest.mark.parametrize("documents", [False, True])
def test_changing_a_token_changes_exactly_what_may_read_it(trunk: str, heads: str, documents: bool) -> None:
    model = make_model(trunk, heads, HORIZONS)
    tokens = random_tokens(1, LENGTH + HORIZONS)
    ids = (torch.arange(LENGTH + HORIZONS) >= 4).long()[None] if documents else None
    before = model(tokens, document_ids=ids)
    for changed in range(tokens.shape[1]):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 11
        after = model(other, document_ids=ids)
        for horizon, was, is_ in zip(model.horizons, before, after, strict=True):
            moved = [not torch.allclose(was[0, t], is_[0, t], rtol=0, atol=1e-12) for t in range(LENGTH)]
            same = [not documents or (t >= 4) == (changed >= 4) for t in range(LENGTH)]
            reach = last_reached(model, horizon)
            may = [t + reach >= changed and (t < changed or same[t]) for t in range(LENGTH)]
            assert moved == may


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@pytest.mark.parametrize("num_horizons", [1, 2, 4])
def test_states_at_positions_are_those_of_all_positions(trunk: str, heads: str, num_horizons: int) -> None:
    model = make_model(trunk, heads, num_horizons)
    tokens = random_tokens(2, LENGTH + num_horizons)
    ids = torch.randint(2, tokens.shape).sort(dim=1).values
    positions = sample_positions(2, LENGTH, 0.5, torch.device("cpu"))
    for documents in (None, ids):
        every = model(tokens, document_ids=documents)
        some = model(tokens, document_ids=documents, positions=positions)
        assert_same(some[0], every[0])
        for one, other in zip(some[1:], every[1:], strict=True):
            assert_same(one, other[torch.arange(2)[:, None], positions])


@given(st.data())
@pytest.mark.parametrize("trunk", TRUNKS)
def test_packed_documents_equal_forward_passes_of_their_own(trunk: str, data: st.DataObject) -> None:
    model = make_trunk(trunk)
    row = st.lists(st.integers(0, 2), min_size=6, max_size=6)
    ids = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    tokens = random_tokens(*ids.shape, seed=data.draw(st.integers(0, 9)))
    hidden, features = model(tokens, document_ids=ids)
    assert_same(torch.cat((hidden, *features), dim=2), naive.by_document(model, tokens, ids))


def packed_and_apart(lengths: list[list[int]]) -> tuple[tuple, tuple]:
    """Return a packed batch with documents of these lengths, and one with a row for each; padding is not learned."""
    total, longest = max(map(sum, lengths)), max(max(row) for row in lengths)
    packed = torch.zeros(len(lengths), total + HORIZONS, dtype=torch.long)
    ids, mask = torch.full_like(packed, -1), torch.zeros_like(packed, dtype=torch.bool)
    alone = torch.zeros(sum(map(len, lengths)), longest + HORIZONS, dtype=torch.long)
    alone_mask, document = torch.zeros_like(alone, dtype=torch.bool), 0
    for b, row in enumerate(lengths):
        start = 0
        for length in row:
            text = random_tokens(1, length, seed=document)[0]
            packed[b, start : start + length], alone[document, :length] = text, text
            ids[b, start : start + length] = document
            mask[b, start : start + length] = alone_mask[document, :length] = True
            start, document = start + length, document + 1
    return (packed, ids, mask), (alone, None, alone_mask)


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@pytest.mark.parametrize("lengths", [[[5, 2, 4], [1, 8]], [[3, 3, 3]]], ids=str)
@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_a_packed_batch_trains_like_separate_rows(
    trunk: str, heads: str, lengths: list[list[int]], distillation: float
) -> None:
    model = make_model(trunk, heads, HORIZONS)
    loss = MultiTokenLoss(distillation=distillation)
    packed, apart = (
        loss(model, tokens, document_ids=ids, loss_mask=mask) for tokens, ids, mask in packed_and_apart(lengths)
    )
    assert packed.count.tolist() == apart.count.tolist()
    assert_same(packed.loss, apart.loss)
    assert_same(packed.nll, apart.nll)
    assert_same(gradients(model, packed.loss), gradients(model, apart.loss))
