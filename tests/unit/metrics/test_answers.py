"""Exact answers against a loop, and against what greedy decoding writes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import AutoregressiveDecoder, LinearHeads, MTPModel, MultiTokenLoss, RecurrentTrunk
from mtp_modules.core.outputs import LossTerms
from mtp_modules.metrics import AnswerAccuracy


def terms(rank: torch.Tensor, valid: torch.Tensor) -> LossTerms:
    nothing = torch.zeros(rank.shape[2])
    return LossTerms(
        loss=torch.zeros(()),
        nll=nothing,
        count=nothing.long(),
        rank=rank,
        valid=valid,
        agrees=rank == 0,
        comparable=valid.all(dim=2),
    )


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_the_shares_are_those_of_a_loop(seed: int, rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randint(2, (rows, length, 2), generator=generator)
    valid, mask = (torch.rand((rows, length, 2), generator=generator) < 0.8 for _ in range(2))
    metric = AnswerAccuracy()
    metric.update(terms(rank, valid), mask[:, :, 0])
    whole, asked, right, tokens = 0, 0, 0, 0
    for row in range(rows):
        answer = [t for t in range(length) if mask[row, t, 0] and valid[row, t, 0]]
        correct = [t for t in answer if rank[row, t, 0] == 0]
        whole += bool(answer) and correct == answer
        asked += bool(answer)
        right += len(correct)
        tokens += len(answer)
    found = {key: float(value) for key, value in metric.compute().items()}
    expected = {"answer/exact": whole / asked, "answer/tokens": right / tokens} if asked else {}
    assert found == pytest.approx(expected)


def test_a_right_row_is_one_that_greedy_decoding_writes() -> None:
    model = MTPModel(trunk=RecurrentTrunk(vocab_size=3, d_model=8), heads=LinearHeads(d_model=8, num_horizons=2)).eval()
    prompts = torch.randint(3, (64, 2))
    written = AutoregressiveDecoder().generate(model, prompts.tolist(), max_new_tokens=3)
    truth = torch.tensor(written.tokens)[:, -3:]
    wrong = torch.arange(64) % 3 == 0  # a third of the answers are another text than the model writes
    place = torch.arange(64) % 2
    truth[wrong, place[wrong]] = (truth[wrong, place[wrong]] + 1) % 3
    tokens = torch.cat((prompts, truth, torch.zeros(64, 1, dtype=torch.long)), dim=1)
    mask = torch.zeros(64, 4, dtype=torch.bool)
    mask[:, 1:4] = True  # targets of positions 1, 2, 3 are the three answer tokens
    metric = AnswerAccuracy()
    with torch.no_grad():
        for part in (slice(0, 40), slice(40, 64)):  # adding up over batches
            metric.update(MultiTokenLoss().eval()(model, tokens[part]), mask[part])
    assert float(metric.compute()["answer/exact"]) == pytest.approx(float((~wrong).double().mean()))


def test_no_answer_gives_nothing() -> None:
    metric = AnswerAccuracy()
    metric.update(terms(torch.zeros(2, 3, 1).long(), torch.ones(2, 3, 1).bool()), torch.zeros(2, 3).bool())
    assert metric.compute() == {}


def test_a_mask_of_the_tokens_instead_of_the_positions_is_refused() -> None:
    wrong = torch.ones(2, 5).bool()
    with pytest.raises(ValueError, match=r"answer_mask: must have one entry per position, \(2, 3\), got \(2, 5\)"):
        AnswerAccuracy().update(terms(torch.zeros(2, 3, 2).long(), torch.ones(2, 3, 2).bool()), wrong)
