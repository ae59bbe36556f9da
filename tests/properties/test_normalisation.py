"""Laws of how batches add up, and of what horizons beyond the first may train."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules import GeometricWeights, MultiTokenLoss
from mtp_modules.core.targets import count_targets
from mtp_modules.data import CountsAhead
from tests.helpers import EVERY_HEADS, JOINT, assert_same, gradients, make_model, random_tokens

ROWS, LENGTH, H = 6, 7, 3


def _batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": random_tokens(ROWS, LENGTH, seed=seed),
        "document_ids": torch.randint(3, (ROWS, LENGTH), generator=generator).sort(dim=1).values,
        "loss_mask": torch.rand(ROWS, LENGTH, generator=generator) < 0.7,
    }


@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, ROWS - 1)), heads=st.sampled_from(list(EVERY_HEADS)))
def test_the_parts_of_a_batch_add_up_to_it(seed: int, cuts: set[int], heads: str) -> None:
    model, batch = make_model("transformer", heads, H, seed=seed % 7), _batch(seed)
    distillation = 0.0 if heads in JOINT else 0.3
    loss = MultiTokenLoss(weights=GeometricWeights(gamma=0.5), distillation=distillation)
    whole = loss(model, **batch)
    counts = count_targets(batch["tokens"], model.horizons, batch["document_ids"], batch["loss_mask"])
    assert counts.equal(whole.count)
    edges = [0, *sorted(cuts), ROWS]
    total, summed = torch.zeros((), dtype=torch.float64), None
    for start, stop in itertools.pairwise(edges):
        terms = loss(model, **{name: value[start:stop] for name, value in batch.items()}, counts=counts)
        part = gradients(model, terms.loss)
        summed = part if summed is None else {name: summed[name] + part[name] for name in part}
        total = total + terms.loss.detach()
    assert_same(total, whole.loss.detach())
    assert_same(summed, gradients(model, whole.loss))


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), ahead=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_batch_knows_the_counts_of_those_that_follow(sizes: list[int], ahead: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        {"tokens": torch.zeros(size, 5, dtype=torch.long), "loss_mask": torch.rand(size, 5, generator=generator) < 0.5}
        for size in sizes
    ]
    own = [count_targets(batch["tokens"], (1, 3), None, batch["loss_mask"]) for batch in batches]
    nothing = torch.zeros(2, dtype=torch.long)
    got = list(CountsAhead(batches, horizons=(1, 3), batches=ahead))
    assert len(got) == len(sizes)
    for index, batch in enumerate(got):
        wanted = [own[place] if place < len(own) else nothing for place in range(index, index + ahead)]
        assert batch["counts_ahead"].equal(torch.stack(wanted))
        assert batch["tokens"] is batches[index]["tokens"]


@pytest.mark.parametrize("heads", EVERY_HEADS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_horizons_beyond_the_first_train_only_what_they_may(heads: str, share: float) -> None:
    model = make_model("transformer", heads, H, tied=False)
    tokens = random_tokens(3, 9)

    def trained(*detach: str, near_only: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        loss = MultiTokenLoss(detach=detach, share_of_positions=share)
        return gradients(model, loss(model, tokens, weights=[1.0, 0.0, 0.0] if near_only else [1.0, 0.7, 0.4]).loss)

    everything, near = trained(), trained(near_only=True)
    by_name = {name: trained(name) for name in ("trunk", "embedding", "unembedding")}
    alone = trained("trunk", "embedding", "unembedding")
    for name, gradient in everything.items():
        missing = sum(gradient - part[name] for part in by_name.values())
        assert_same(gradient - missing, alone[name])  # the three ways are separate, and add up
        if name.startswith("heads.") or name == "unembedding.transition":
            assert_same([part[name] for part in by_name.values()], [gradient] * 3)
        else:
            assert_same(alone[name], near[name])
    inner = "trunk.layers.0.attention.qkv.weight"
    assert_same(by_name["trunk"][inner], near[inner])
    assert_same(by_name["embedding"][inner], everything[inner])
    assert (by_name["unembedding"]["unembedding.weight"] - everything["unembedding.weight"]).abs().max() > 1e-3
    reads = (by_name["embedding"]["trunk.embedding.weight"] - everything["trunk.embedding.weight"]).abs().max() > 1e-3
    assert reads == model.heads.reads_future


def test_a_part_that_nothing_is_known_of_cannot_be_detached() -> None:
    with pytest.raises(
        ValueError, match=r"^MultiTokenLoss: detach may hold trunk, embedding, unembedding, got 'heads'\.$"
    ):
        MultiTokenLoss(detach=["heads"])
