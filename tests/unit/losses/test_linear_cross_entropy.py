"""The naive backend, which every other backend is compared with."""

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.objective import OutputMatrix, Teacher
from mtp_modules.losses import NaiveLinearCrossEntropy
from tests.helpers import assert_same

STATES = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHT = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
BIAS = torch.randn(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MATRICES = [OutputMatrix(WEIGHT, BIAS)]
TARGETS = torch.tensor([2, 6, -1, 0])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)


def test_a_weighted_sum_of_cross_entropies() -> None:
    terms = NaiveLinearCrossEntropy()(STATES, MATRICES, [4], TARGETS, WEIGHTS)
    logits = STATES @ WEIGHT.T + BIAS
    nll = F.cross_entropy(logits, TARGETS, reduction="none", ignore_index=-1)
    assert_same(terms.nll, nll)
    assert_same(terms.loss, nll[0] + 0.5 * nll[1])
    assert terms.predicted.tolist() == logits.argmax(dim=1).tolist()
    for index in (0, 1, 3):
        better = [other for other in range(7) if logits[index, other] > logits[index, TARGETS[index]]]
        assert terms.rank[index] == len(better)


def test_a_state_without_a_target_may_hold_anything() -> None:
    states = STATES.clone()
    states[2] = torch.nan
    terms = NaiveLinearCrossEntropy()(states, MATRICES, [4], TARGETS, WEIGHTS)
    assert_same(terms.loss, NaiveLinearCrossEntropy()(STATES, MATRICES, [4], TARGETS, WEIGHTS).loss)
    assert terms.nll[2] == 0


def test_a_teacher_takes_its_share() -> None:
    share = torch.tensor([0.25, 1.0, 0.0, 0.0], dtype=torch.float64)
    teacher = Teacher(STATES.flip(0), share)
    terms = NaiveLinearCrossEntropy()(STATES, MATRICES, [4], TARGETS, WEIGHTS, teacher)
    log_probs = (STATES @ WEIGHT.T + BIAS).log_softmax(dim=1)
    probs = (STATES.flip(0) @ WEIGHT.T + BIAS).softmax(dim=1)
    soft = -(probs * log_probs).sum(dim=1)
    assert_same(terms.loss, 0.75 * -log_probs[0, 2] + 0.25 * soft[0] + 0.5 * soft[1])
    assert_same(terms.nll[1], -log_probs[1, 6])


def test_half_precision_states_are_scored_in_single_precision() -> None:
    terms = NaiveLinearCrossEntropy()(STATES.half(), [OutputMatrix(WEIGHT.half())], [4], TARGETS, WEIGHTS.float())
    assert terms.loss.dtype == terms.nll.dtype == torch.float32
