"""Per-head metrics against counting by hand, in parts, and over two processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import PerHeadMetrics
from mtp_modules.core.outputs import LossTerms
from mtp_modules.metrics.functional import accepted_lengths, perplexities
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same

HORIZONS = 3


def random_terms(seed: int, *, rows: int = 2, positions: int = 4, horizons: int = HORIZONS) -> LossTerms:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, positions, horizons)

    def coin(share: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < share

    agrees = coin(0.6)
    agrees[:, :, 0] = True
    return LossTerms(
        loss=torch.zeros(()),
        nll=torch.rand(horizons, generator=generator, dtype=torch.float64),
        count=torch.randint(0, 9, (horizons,), generator=generator),
        rank=torch.randint(0, 8, shape, generator=generator),
        valid=coin(0.7),
        agrees=agrees,
        comparable=coin(0.5)[:, :, 0],
    )


def count_by_hand(batches: list[LossTerms], top_k: tuple[int, ...]) -> dict[str, float]:
    found = {}
    for h in range(HORIZONS):
        targets = sum(int(terms.count[h]) for terms in batches)
        nats = sum(float(terms.nll[h]) * int(terms.count[h]) for terms in batches)
        found[f"loss/head_{h + 1}"] = nats / max(targets, 1)
        found[f"perplexity/head_{h + 1}"] = math.exp(nats / targets) if targets else 0.0
        for k in top_k:
            tried = hit = 0
            for terms in batches:
                for rank, valid in zip(terms.rank.flatten(0, 1), terms.valid.flatten(0, 1), strict=True):
                    tried += bool(valid[h])
                    hit += bool(valid[h]) and int(rank[h]) < k
            name = "accuracy" if k == 1 else f"top{k}_accuracy"
            found[f"{name}/head_{h + 1}"] = hit / max(tried, 1)
    lengths = []
    for terms in batches:
        for agrees, comparable in zip(terms.agrees.flatten(0, 1), terms.comparable.flatten(), strict=True):
            if comparable:
                row = agrees.tolist()
                lengths.append(row.index(False) if False in row else HORIZONS)
    found["accepted_length"] = sum(lengths) / max(len(lengths), 1)
    return found


def computed(metrics: PerHeadMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.compute().items()}


@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3), top_k=st.sampled_from([(1, 5), (1,), (2, 3), (5, 1)])
)
def test_figures_equal_counting_by_hand(seeds: list[int], top_k: tuple[int, ...]) -> None:
    metrics = PerHeadMetrics(num_horizons=HORIZONS, top_k=top_k)
    batches = [random_terms(seed, rows=1 + seed % 3) for seed in seeds]
    for terms in batches:
        metrics.update(terms)
    assert computed(metrics) == pytest.approx(count_by_hand(batches, top_k), rel=1e-6)


def test_the_keys_are_those_of_the_log() -> None:
    metrics = PerHeadMetrics(num_horizons=2)
    metrics.update(random_terms(0, horizons=2))
    assert list(metrics.compute()) == [
        "loss/head_1",
        "perplexity/head_1",
        "accuracy/head_1",
        "top5_accuracy/head_1",
        "loss/head_2",
        "perplexity/head_2",
        "accuracy/head_2",
        "top5_accuracy/head_2",
        "accepted_length",
    ]


@given(seed=st.integers(0, 99))
def test_figures_stay_on_their_scale(seed: int) -> None:
    metrics = PerHeadMetrics(num_horizons=HORIZONS)
    metrics.update(random_terms(seed))
    for name, value in computed(metrics).items():
        if "accuracy" in name:
            assert 0 <= value <= 1
        if name == "accepted_length":
            assert 1 <= value <= HORIZONS or not random_terms(seed).comparable.any()


def test_without_anything_to_count_every_figure_is_zero() -> None:
    terms = random_terms(0)
    empty = LossTerms(
        loss=terms.loss,
        nll=torch.zeros(HORIZONS),
        count=torch.zeros(HORIZONS, dtype=torch.long),
        rank=terms.rank,
        valid=torch.zeros_like(terms.valid),
        agrees=terms.agrees,
        comparable=torch.zeros_like(terms.comparable),
    )
    metrics = PerHeadMetrics(num_horizons=HORIZONS)
    metrics.update(empty)
    assert set(computed(metrics).values()) == {0.0}


def test_reset_forgets() -> None:
    metrics = PerHeadMetrics(num_horizons=HORIZONS)
    metrics.update(random_terms(0))
    metrics.reset()
    metrics.update(random_terms(1))
    alone = PerHeadMetrics(num_horizons=HORIZONS)
    alone.update(random_terms(1))
    assert computed(metrics) == computed(alone)


def test_two_halves_merge_into_the_whole() -> None:
    whole, *halves = (PerHeadMetrics(num_horizons=HORIZONS) for _ in range(3))
    for seed in range(4):
        whole.update(random_terms(seed))
        halves[seed % 2].update(random_terms(seed))
    halves[0].merge_state(halves[1])
    assert computed(halves[0]) == pytest.approx(computed(whole), rel=1e-12)


def test_a_forward_pass_gives_the_figures_of_the_batch_and_counts_it() -> None:
    metrics = PerHeadMetrics(num_horizons=HORIZONS)
    metrics.update(random_terms(0))
    of_batch = {name: float(value) for name, value in metrics(random_terms(1)).items()}
    assert of_batch == pytest.approx(count_by_hand([random_terms(1)], (1, 5)), rel=1e-6)
    assert computed(metrics) == pytest.approx(count_by_hand([random_terms(0), random_terms(1)], (1, 5)), rel=1e-6)


def test_many_batches_lose_no_precision() -> None:
    """The sum of losses is kept in float64, so the millionth batch counts as much as the first."""
    metrics = PerHeadMetrics(num_horizons=HORIZONS)
    metrics.update(random_terms(0))
    metrics.nll_sum += 2**24 * 3
    before = metrics.nll_sum.clone()
    metrics.update(random_terms(1))
    terms = random_terms(1)
    assert_same(metrics.nll_sum - before, terms.nll * terms.count, tolerance=1e-7)


def test_the_perplexity_of_a_uniform_distribution_is_the_size_of_the_vocabulary() -> None:
    nll = torch.tensor([256.0, 131072.0, 7.0], dtype=torch.float64).log()
    found = perplexities(nll, torch.tensor([1, 9, 0]))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([256.0, 131072.0, 0.0])


def test_accepted_lengths() -> None:
    agrees = torch.tensor([[[True, True, True], [True, False, True], [True, True, False]]])
    assert accepted_lengths(agrees).tolist() == [[3, 1, 2]]


@pytest.mark.parametrize("arguments", [{"num_horizons": 0}, {"num_horizons": 2, "top_k": (1, 0)}], ids=str)
def test_numbers_below_1_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"^PerHeadMetrics: (num_horizons|top_k) must be at least 1, got 0\.$"):
        PerHeadMetrics(**arguments)


def _one_rank() -> dict[str, torch.Tensor]:
    """Count every second batch, and return the figures of all."""
    metrics = PerHeadMetrics(num_horizons=HORIZONS)
    for seed in range(torch.distributed.get_rank(), 5, 2):
        metrics.update(random_terms(seed))
    return metrics.compute()


def test_two_processes_count_what_one_does() -> None:
    expected = count_by_hand([random_terms(seed) for seed in range(5)], (1, 5))
    for figures in run_ranks(_one_rank):
        assert {name: float(value) for name, value in figures.items()} == pytest.approx(expected, rel=1e-6)
        assert not any(math.isnan(value) for value in figures.values())
