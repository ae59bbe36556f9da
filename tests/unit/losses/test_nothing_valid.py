"""A batch without a valid target, for some horizons or for all, trains nothing with any backend."""

from collections.abc import Callable

import pytest
import torch

from mtp_modules import MultiTokenLoss
from mtp_modules.losses import (
    FusedLinearCrossEntropy,
    NaiveLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
)
from tests.helpers import gradients, make_model, random_tokens

BACKENDS = [
    NaiveLinearCrossEntropy,
    FusedLinearCrossEntropy,
    RecomputeLinearCrossEntropy,
    SequentialLinearCrossEntropy,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("learned", "counts"), [((), [0, 0, 0]), ((1,), [2, 0, 0]), ((2, 3), [4, 4, 2])], ids=["none", "near", "some"]
)
def test_horizons_without_targets_give_no_gradient_and_no_nan(
    backend: Callable, learned: tuple[int, ...], counts: list[int]
) -> None:
    model, tokens = make_model("transformer", "linear", 3), random_tokens(2, 8)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, list(learned)] = True
    terms = MultiTokenLoss(backend=backend())(model, tokens, loss_mask=mask)
    assert terms.count.tolist() == counts
    assert terms.loss.isfinite()
    found = gradients(model, terms.loss)
    for horizon, count in enumerate(counts):
        gradient = found[f"heads.maps.{horizon}.weight"]
        assert gradient.isfinite().all()
        assert gradient.any() == (count > 0)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any(gradient.any() for gradient in found.values()) == any(counts)
