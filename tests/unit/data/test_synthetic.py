"""Progressions follow the distribution that the ceiling is computed from."""

import math
import re
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.data import ProgressionDataModule, progression_ceiling


def enumerate_ceiling(
    vocab_size: int, length: int, steps: list[int], horizons: list[int], lookahead: int
) -> tuple[list[float], list[float]]:
    """Try every progression: the best answer to a prefix is the likeliest continuation among those that share it."""
    row_length = length + lookahead
    probs: list[tuple[list[int], Fraction]] = []
    for step in steps:
        starts = [start for start in range(vocab_size) if start + step * (row_length - 1) < vocab_size]
        for start in starts:
            row = [start + step * place for place in range(row_length)]
            probs.append((row, Fraction(1, len(steps) * len(starts))))
    accuracy, nll = [], []
    for horizon in horizons:
        hits, nats = Fraction(0), 0.0
        for position in range(length):
            seen: dict[tuple[int, ...], dict[int, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
            for row, probability in probs:
                seen[tuple(row[: position + 1])][row[position + horizon]] += probability
            for answers in seen.values():
                hits += max(answers.values())
                nats -= sum(float(p) * math.log(p / sum(answers.values())) for p in answers.values())
        accuracy.append(float(hits) / length)
        nll.append(nats / length)
    return accuracy, nll


@given(
    st.integers(2, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 12),
)
def test_ceiling_equals_enumeration(length: int, steps: list[int], lookahead: int, room: int) -> None:
    vocab_size = max(steps) * (length + lookahead - 1) + 1 + room
    horizons = list(range(1, lookahead + 1))
    ceiling = progression_ceiling(
        vocab_size=vocab_size, length=length, steps=steps, horizons=horizons, lookahead=lookahead
    )
    accuracy, nll = enumerate_ceiling(vocab_size, length, steps, horizons, lookahead)
    assert ceiling.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert ceiling.nll == pytest.approx(nll, abs=1e-12)


def test_ceiling_of_the_notebook() -> None:
    """Starts 0..27 fit step 1, starts 0..5 fit step 2: the first position is guessed right with 1/2 + 1/2 * 22/28."""
    ceiling = ProgressionDataModule(batch_size=4, lookahead=3).ceiling([1, 2, 3])
    assert ceiling.accuracy == pytest.approx([(19 + 0.5 + 0.5 * 22 / 28) / 20] * 3)
    assert ceiling == progression_ceiling(vocab_size=50, length=20, steps=[1, 2], horizons=[1, 2, 3], lookahead=3)


def test_rows_follow_the_distribution() -> None:
    data = ProgressionDataModule(batch_size=4, lookahead=3, num_train=40_000)
    tokens = data.rows("train").tokens
    step = tokens[:, 1] - tokens[:, 0]
    assert tokens.shape == (40_000, 23)
    assert tokens.min() == 0
    assert tokens.max() == 49
    assert ((tokens[:, 1:] - tokens[:, :-1]) == step[:, None]).all()
    assert (step == 1).mean() == pytest.approx(0.5, abs=0.015)
    best = torch.zeros(50, 50)
    for start, following in tokens[:, :2].tolist():
        best[start, following] += 1
    assert float(best.max(dim=1).values.sum()) / 40_000 == pytest.approx(0.5 + 0.5 * 22 / 28, abs=0.01)


def test_batches() -> None:
    data = ProgressionDataModule(batch_size=4, lookahead=2, length=5, num_train=10, num_val=6, num_test=3)
    assert [batch["tokens"].shape for batch in data.train_dataloader()] == [(4, 7), (4, 7)]
    assert [batch["tokens"].shape for batch in data.val_dataloader()] == [(4, 7), (2, 7)]
    assert [list(batch) for batch in data.test_dataloader()] == [["tokens"]]
    assert next(iter(data.train_dataloader()))["tokens"].dtype == torch.int64
    assert data.vocab_size == 50


def test_the_seed_says_everything() -> None:
    def tokens(seed: int, split: str) -> list[list[int]]:
        data = ProgressionDataModule(batch_size=4, lookahead=1, seed=seed)
        return data.rows(split).tokens.tolist()

    assert tokens(0, "train") == tokens(0, "train")
    assert tokens(0, "train") != tokens(1, "train")
    assert tokens(0, "val") != tokens(0, "test")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"length": 30},
            r"33 tokens at step 2 end at 64 or higher, outside the vocabulary 0..49; take a shorter length",
        ),
        ({"steps": []}, r"steps must be a list of numbers of at least 1, got \[\]"),
        ({"steps": [0]}, r"steps must be a list of numbers of at least 1, got \[0\]"),
        ({"num_val": 0}, "num_val must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_senseless_arguments_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressionDataModule(**{"batch_size": 4, "lookahead": 3, **kwargs})


def test_a_horizon_beyond_the_lookahead_has_no_ceiling() -> None:
    with pytest.raises(ValueError, match=r"horizons must lie in 1..lookahead \(3\), got \[4\]"):
        ProgressionDataModule(batch_size=4, lookahead=3).ceiling([4])


@given(st.integers(0, 99), st.floats(0.1, 0.8), st.integers(1, 3), st.integers(0, 2))
def test_training_never_sees_a_progression_that_is_held_out(seed: int, share: float, lookahead: int, more: int) -> None:
    data = ProgressionDataModule(
        batch_size=4,
        lookahead=lookahead,
        max_lookahead=lookahead + more,
        length=5,
        vocab_size=40,
        steps=[1, 2, 3],
        num_train=200,
        num_val=100,
        num_test=100,
        held_out_share=share,
        seed=seed,
    )
    seen = {
        split: {tuple(row[:2].tolist()) for row in data.rows(split).batch(data.rows(split).fixed_ids())["tokens"]}
        for split in ("train", "val", "test")
    }
    assert not seen["train"] & (seen["val"] | seen["test"])
    assert data.ceiling([1]).accuracy[0] > 0.8


def test_fewer_horizons_read_the_same_progressions_if_they_leave_room() -> None:
    rows = []
    for lookahead in (1, 4):
        data = ProgressionDataModule(batch_size=4, lookahead=lookahead, max_lookahead=4, held_out_share=0.3)
        rows.append(data.rows("train").tokens)
    assert rows[0].shape[1] == rows[1].shape[1] - 3
    assert (rows[0] == rows[1][:, :-3]).all()


def test_the_ceiling_of_held_out_rows_equals_enumeration() -> None:
    data = ProgressionDataModule(batch_size=4, lookahead=2, length=4, vocab_size=30, steps=[1, 2], held_out_share=0.5)
    all_probs: dict[int, list[float]] = defaultdict(list)
    for own in (sides[1] for sides in data._starts):
        for start in own.tolist():
            all_probs[start].append(0.5 / len(own))
    first = sum(max(those) for those in all_probs.values())
    assert data.ceiling([1, 2]).accuracy == pytest.approx([(3 + first) / 4] * 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"held_out_share": 1.5}, "held_out_share must lie in [0, 1], got 1.5"),
        ({"held_out_share": 0.95}, "held_out_share 0.95 of the 4 starts of step 2 leaves none to train on"),
        ({"max_lookahead": 2}, "max_lookahead must be at least 4, got 2"),
    ],
)
def test_what_held_out_data_refuses(arguments: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ProgressionDataModule(batch_size=4, lookahead=4, **arguments)
