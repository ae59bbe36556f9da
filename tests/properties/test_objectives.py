"""Laws of auxiliary objectives: equal to their naive twins, batches add up, nothing crosses documents."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.trunk import TrunkOutput
from mtp_modules.objectives import AuxiliaryObjective, AuxiliaryText, FutureBagOfWords, NextSpan, TokenOrder
from mtp_modules.objectives.sparse import SparseTargets, sparse_terms
from tests.helpers import float64, randomise
from tests.reference import objectives as naive

V, D, ROWS, LENGTH, AHEAD = 7, 4, 3, 9, 2
SIZES = {"d_model": D, "vocab_size": V}
TEXTS = ["a", "b,", " ", " d", "e.", "\n", "g "]
ENDS = [False, True, False, False, True, True, False]
KINDS: dict[str, Callable[[int], AuxiliaryObjective]] = {
    "token_order": lambda window: TokenOrder(**SIZES, window=window, weight=0.7),
    "bag": lambda window: FutureBagOfWords(**SIZES, window=window + 1, weighted=False, weight=0.7),
    "next_span": lambda window: NextSpan(**SIZES, level="phrase", window=window, weighted=False, weight=0.7),
    "weighted_bag": lambda window: FutureBagOfWords(**SIZES, window=window + 1, weight=0.7),
}


def make(kind: str, window: int) -> AuxiliaryObjective:
    with float64():
        objective = KINDS[kind](window)
    randomise(objective)
    if objective.reads_frequencies:
        objective.set_frequencies(torch.tensor([5, 0, 1, 9, 3, 2, 2]))
    if objective.reads_vocabulary:
        objective.set_vocabulary(TEXTS)
    return objective


def example(seed: int, *, plain: bool = False) -> tuple[TrunkOutput, AuxiliaryText]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, LENGTH - AHEAD, D, generator=generator, dtype=torch.float64)
    tokens = torch.randint(V, (ROWS, LENGTH), generator=generator)
    tokens[torch.rand(ROWS, LENGTH, generator=generator) < 0.1] = -100
    documents = torch.randint(3, (ROWS, LENGTH), generator=generator).sort(dim=1).values
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    text = AuxiliaryText(tokens, LENGTH - AHEAD, *((None, None) if plain else (documents, mask)))
    return TrunkOutput(hidden.requires_grad_()), text


def part(output: TrunkOutput, text: AuxiliaryText, rows: slice) -> tuple[TrunkOutput, AuxiliaryText]:
    cut = (None if each is None else each[rows] for each in (text.document_ids, text.loss_mask))
    return TrunkOutput(output.hidden[rows]), AuxiliaryText(text.tokens[rows], text.length, *cut)


def twin(objective: AuxiliaryObjective, output: TrunkOutput, text: AuxiliaryText) -> tuple[torch.Tensor, int]:
    """Return the mean loss by the naive twin, and how many examples there are."""
    if isinstance(objective, TokenOrder):
        losses, places = naive.token_order(objective.unembedding(output.hidden), text, objective.window)
    else:
        assert isinstance(objective, FutureBagOfWords | NextSpan)
        states = output.hidden + F.silu(objective.summary(output.hidden))
        window, weights = objective.window, objective.token_weights.tolist()

        def bag_of(row: int, place: int) -> set[int | None]:
            if isinstance(objective, NextSpan):
                return naive.next_span(text, row, place, window, ENDS, TEXTS)
            return {naive.upcoming(text, row, place, distance) for distance in range(2, window + 1)}

        losses, places = naive.bag_of_words(objective.unembedding(states), text, weights, bag_of)
    return (torch.stack(losses).mean() if losses else output.hidden.sum() * 0), len(places)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), window=st.integers(1, 12), plain=st.booleans())
def test_loss_and_gradients_are_those_of_the_naive_twin(kind: str, seed: int, window: int, plain: bool) -> None:
    objective, (output, text) = make(kind, window), example(seed, plain=plain)
    wanted = [output.hidden, *objective.parameters()]
    terms, (loss, count) = objective(output, text), twin(objective, output, text)
    assert terms.examples == objective.count(text) == count
    torch.testing.assert_close(terms.loss, objective.weight * loss, rtol=1e-10, atol=1e-12)
    if count:
        torch.testing.assert_close(terms.sums["loss"] / count, loss, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(terms.loss, wanted)
    expected = torch.autograd.grad(objective.weight * loss, wanted, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, ROWS - 1)))
def test_the_parts_of_a_batch_add_up_to_it(kind: str, seed: int, cuts: set[int]) -> None:
    objective, (output, text) = make(kind, 3), example(seed)
    whole, count = objective(output, text), objective.count(text)
    pieces = [part(output, text, slice(*edges)) for edges in itertools.pairwise([0, *sorted(cuts), ROWS])]
    assert sum(objective.count(piece) for _, piece in pieces) == count
    found = [objective(*piece, count=count) for piece in pieces]
    torch.testing.assert_close(sum(each.loss for each in found), whole.loss, rtol=1e-12, atol=1e-13)
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(each.sums[name] for each in found), value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000))
def test_another_document_changes_nothing(kind: str, seed: int) -> None:
    """Neither do tokens that are no targets, but those that a span ends with."""
    objective, (output, text) = make(kind, 12), example(seed)
    assert text.document_ids is not None
    assert text.loss_mask is not None
    last = text.document_ids == text.document_ids[:, -1:]
    other = torch.where(
        last if kind == "next_span" else last | ~text.loss_mask, (text.tokens.clamp(min=0) + 3) % V, text.tokens
    )
    changed = replace(text, tokens=other)
    found = [
        torch.autograd.grad(objective(output, each, count=torch.tensor(10)).loss, output.hidden)[0]
        for each in (text, changed)
    ]
    before = ~last[:, : text.length]
    assert torch.equal(found[0][before], found[1][before])


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_chunks_of_the_sparse_loss_do_not_matter(rows: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(5, D, generator=generator, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.stack([torch.randperm(V, generator=generator)[:3] for _ in range(5)])
    targets = SparseTargets(tokens, torch.rand(5, 3, generator=generator, dtype=torch.float64))
    weights = torch.rand(5, generator=generator, dtype=torch.float64)
    own = torch.rand(V, generator=generator, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(
        lambda one, two: sparse_terms(one, two, targets, weights, token_weights=own, rows=rows).loss, (states, matrix)
    )
