"""Augmentations: what they change and what they leave, and that a resumed run sees the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.data import ProgressionDataModule, SpanShuffle, TextDataModule, TokenDropout
from mtp_modules.data.augmentation import Augmentation
from mtp_modules.data.loaders import TrainLoader
from mtp_modules.data.rows import EpochOrder

lengths = st.integers(1, 60)
seeds = st.integers(0, 10**6)


def random_row(length: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(length, generator=generator) < 0.1).long().cumsum(0)
    learned = torch.rand(length, generator=generator) < 0.8
    return {"tokens": torch.randperm(length, generator=generator), "document_ids": documents, "loss_mask": learned}


@given(lengths, st.floats(0, 1), seeds)
def test_dropout_changes_inputs_alone_and_draws_from_the_row(length: int, share: float, seed: int) -> None:
    row = random_row(length, seed)
    given_row = {name: values.clone() for name, values in row.items()}
    changed = TokenDropout(share=share).row(row, np.random.default_rng(seed))
    for name, values in given_row.items():
        assert changed[name].equal(values)
        assert row[name].equal(values), "the given row must stay"
    assert set(changed["inputs"].tolist()) <= set(row["tokens"].tolist())
    if share == 0:
        assert changed["inputs"].equal(row["tokens"])


def test_dropout_replaces_its_share() -> None:
    row = {"tokens": torch.arange(100_000)}
    inputs = TokenDropout(share=0.3).row(row, np.random.default_rng(0))["inputs"]
    assert (inputs != row["tokens"]).float().mean().item() == pytest.approx(0.3, abs=0.01)


@given(lengths, st.floats(1, 10), seeds)
def test_shuffling_keeps_documents_and_masks_what_nothing_foretells(length: int, mean: float, seed: int) -> None:
    row = random_row(length, seed)
    shuffled = SpanShuffle(mean_length=mean, share=1.0).row(row, np.random.default_rng(seed))
    assert shuffled["document_ids"].equal(row["document_ids"])
    for document in row["document_ids"].unique():
        inside = row["document_ids"] == document
        assert sorted(shuffled["tokens"][inside].tolist()) == sorted(row["tokens"][inside].tolist())
    place = {token: index for index, token in enumerate(row["tokens"].tolist())}
    for index, token in enumerate(shuffled["tokens"].tolist()):
        starts = index == 0 or row["document_ids"][index] != row["document_ids"][index - 1]
        follows = starts or place[token] == place[shuffled["tokens"][index - 1].item()] + 1
        assert shuffled["loss_mask"][index] == (row["loss_mask"][place[token]] and follows)


def test_spans_have_their_mean_length_and_rows_their_share() -> None:
    shuffle = SpanShuffle(mean_length=8, share=0.25)
    row, spans, shuffled = {"tokens": torch.arange(400)}, [], 0
    for seed in range(800):
        changed = shuffle.row(row, np.random.default_rng(seed))
        if not changed["tokens"].equal(row["tokens"]):
            shuffled += 1
            spans.append(1 + (~changed["loss_mask"]).sum().item())
    assert shuffled / 800 == pytest.approx(0.25, abs=0.05)
    assert 400 / np.mean(spans) == pytest.approx(8, rel=0.06)


@pytest.mark.parametrize("augmentation", [TokenDropout(share=0.4), SpanShuffle(mean_length=2, share=0.7)])
def test_what_happens_to_a_row_depends_on_its_place_alone(augmentation: Augmentation) -> None:
    """Not on the batch size, the processes, the workers, or where a run was resumed."""

    def rows(batch_size: int, *, num_workers: int = 0, after: int = 0) -> list[list[int]]:
        data = ProgressionDataModule(
            batch_size=batch_size,
            lookahead=2,
            length=6,
            num_train=24,
            augmentation=augmentation,
            num_workers=num_workers,
        )
        loader = data.train_dataloader()
        loader.load_state_dict({**loader.state_dict(), "position": after})
        batches = [*loader, *loader]
        return [row for batch in batches for row in torch.cat([batch[name] for name in sorted(batch)], dim=1).tolist()]

    whole = rows(4)
    assert len(whole) == 48
    assert whole[:24] != whole[24:]
    assert rows(12) == rows(4, num_workers=1) == whole
    assert rows(4, after=8)[: 48 - 8] == whole[8:]


def test_the_sequence_is_the_same_over_two_processes() -> None:
    rows = ProgressionDataModule(batch_size=4, lookahead=2, length=6, num_train=24).rows("train")

    def loader(batch_size: int, rank: int, world_size: int) -> list[torch.Tensor]:
        train = TrainLoader(
            order=EpochOrder(rows=rows, seed=5),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            augmentation=TokenDropout(share=0.5),
        )
        return [batch["inputs"] for batch in train]

    one = loader(4, 0, 1)
    first, second = loader(2, 0, 2), loader(2, 1, 2)
    for whole, *halves in zip(one, first, second, strict=True):
        assert whole[0::2].equal(halves[0])
        assert whole[1::2].equal(halves[1])


def test_evaluation_is_not_augmented() -> None:
    data = ProgressionDataModule(batch_size=4, lookahead=2, length=6, augmentation=TokenDropout(share=0.5))
    assert all(list(batch) == ["tokens"] for batch in data.val_dataloader())


def test_windows_stay_where_offsets_are_not_random(corpus: Path) -> None:
    def starts(random_offsets: bool) -> set[int]:
        data = TextDataModule(sources=[str(corpus)], window=5, lookahead=2, batch_size=1, random_offsets=random_offsets)
        rows = data.rows("train")
        return {int(start) % 5 for seed in range(6) for start in rows.epoch_ids(np.random.default_rng(seed))}

    assert starts(False) == {0}
    assert len(starts(True)) > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenDropout(share=1.5), r"^TokenDropout: share must lie in \[0, 1\], got 1.5\.$"),
        (lambda: SpanShuffle(share=-0.1), r"^SpanShuffle: share must lie in \[0, 1\], got -0.1\.$"),
        (lambda: SpanShuffle(mean_length=0.5), r"^SpanShuffle: mean_length must be at least 1, got 0.5\.$"),
    ],
)
def test_senseless_arguments_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
