"""What the offset arithmetic refuses, and its worked examples. Its laws are among the properties."""

import pytest
import torch

from mtp_modules.core import future_targets, targets


def test_worked_example() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    mask = torch.tensor([[True, True, True, False, True]])
    found, valid = future_targets(tokens, (1, 3), torch.tensor([[0, 0, 0, 0, 1]]), mask)
    assert found.tolist() == [[[6, 8], [7, 9]]]
    assert valid.tolist() == [[[True, False], [True, False]]]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_row_must_leave_a_position(length: int) -> None:
    sentence = (
        rf"^future_targets: a row of {length} tokens leaves no position for horizon 3; give at least one token more"
    )
    with pytest.raises(ValueError, match=sentence):
        future_targets(torch.zeros(1, length, dtype=torch.long), (1, 3))


@pytest.mark.parametrize("name", ["document_ids", "loss_mask"])
def test_shapes_must_be_equal(name: str) -> None:
    dtype = torch.long if name == "document_ids" else torch.bool
    with pytest.raises(
        ValueError, match=rf"^future_targets: {name} has shape \(1, 4\), tokens \(1, 5\); make them equal"
    ):
        # Through the unchecked function: the shapes in its signature refuse this first while tests run.
        future_targets.__wrapped__(torch.zeros(1, 5, dtype=torch.long), (1,), **{name: torch.ones(1, 4, dtype=dtype)})


def test_where_horizon_one_predicts_the_same_token() -> None:
    found = targets.positions_of_horizon_one(torch.tensor([[0, 4]]), (1, 2, 5))
    assert found.tolist() == [[[0, 1, 4], [4, 5, 8]]]
