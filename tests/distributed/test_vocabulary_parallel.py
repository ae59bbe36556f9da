"""Cross-entropy over a sharded vocabulary against the whole one: figures and gradients, on every rank."""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.vocabulary import Example, sharded, whole
from tests.helpers import assert_same

EXAMPLES = {
    "plain": Example(),
    "vocabulary that divides": Example(vocab_size=12),
    "a token a rank": Example(vocab_size=2),
    "bias": Example(bias=True),
    "teacher": Example(teacher=True),
    "label smoothing": Example(label_smoothing=0.1),
    "z-loss": Example(z_loss=0.01),
    "everything": Example(bias=True, teacher=True, label_smoothing=0.1, z_loss=0.01, vocab_size=13, seed=1),
    "own matrices": Example(own=True, bias=True, teacher=True, z_loss=0.01),
    "detached matrices": Example(detach_far=True, bias=True, teacher=True),
    "one chunk": Example(rows_per_chunk=None, teacher=True),
    "one row a chunk": Example(rows_per_chunk=1, label_smoothing=0.2),
    "nothing counts": Example(ignored=1.0, teacher=True, bias=True, z_loss=0.01),
    "huge logits": Example(scale=300.0, teacher=True),
    "logits of -inf": Example(bias=True, teacher=True, banned=(2, 9)),
    "a shard of them": Example(bias=True, teacher=True, vocab_size=4, banned=(2, 3), z_loss=0.01),
    "equal logits": Example(ties=True, scale=1.0, vocab_size=9, sizes=(60, 30, 30)),
}


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, object]]]:
    """Score all examples on two ranks."""
    return run_ranks(sharded, list(EXAMPLES.values()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_sharded_vocabulary_gives_what_the_whole_one_gives(found: list[list[dict[str, object]]], name: str) -> None:
    index, wanted = list(EXAMPLES).index(name), whole(EXAMPLES[name])
    for rank in found:
        assert_same(rank[index], wanted)


def test_the_examples_have_ties_between_and_within_ranks() -> None:
    example = EXAMPLES["equal logits"]
    terms = whole(example)["terms"]
    assert torch.unique(terms[3] >= 5).tolist() == [False, True]
    assert (terms[2] == 0).sum() > (terms[3] == 0).sum()


def test_all_ranks_agree_to_the_last_bit(found: list[list[dict[str, object]]]) -> None:
    assert_same(found[0], found[1], tolerance=0.0)
