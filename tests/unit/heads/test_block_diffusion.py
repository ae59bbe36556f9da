"""Block diffusion against a naive denoiser, and why its steps go from left to right."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import BlockDiffusionHeads
from tests.helpers import WIDTH, assert_same, float64, make_heads, randomise
from tests.reference import transformer as naive


def build(num_horizons: int, num_steps: int) -> BlockDiffusionHeads:
    with float64():
        heads = BlockDiffusionHeads(
            d_model=WIDTH, num_horizons=num_horizons, num_heads=2, num_steps=num_steps, ffn_width=12
        )
    randomise(heads)
    return heads


def unmasked_attention(heads: BlockDiffusionHeads, x: Tensor) -> Tensor:
    """Return what the only layer says of one sequence, query by query."""
    layer, size = heads.layers[0], len(x)
    attention, table = layer.attention, heads.rotary(None, size, x)
    queries, keys, values = attention.project(naive.rms_norm(x, layer.attention_norm.weight)[None], table)
    out = torch.zeros_like(x)
    for place, head in itertools.product(range(size), range(2)):
        scores = keys[0, head] @ queries[0, head, 0, place] / attention.head_dim**0.5
        out[place, head * 4 : head * 4 + 4] = scores.softmax(dim=0) @ values[0, head]
    x = x + out @ attention.out.weight.T
    return x + layer.ffn(naive.rms_norm(x, layer.ffn_norm.weight))


@given(num_horizons=st.integers(2, 6), data=st.data())
def test_a_step_denoises_what_steps_before_have_left_masked(num_horizons: int, data: st.DataObject) -> None:
    slots = num_horizons - 1
    num_steps = data.draw(st.integers(1, slots), label="steps")
    heads, hidden = build(num_horizons, num_steps), torch.randn(1, 2, WIDTH).double()
    future = torch.randn(1, 2, slots, WIDTH).double()
    states = heads(hidden, future=future)
    assert states[0] is hidden
    sizes = [high - low for low, high in itertools.pairwise(heads.bounds)]
    assert (sum(sizes), max(sizes) - min(sizes) <= 1, len(sizes)) == (slots, True, num_steps)
    for t, slot in itertools.product(range(2), range(slots)):
        first = max(bound for bound in heads.bounds if bound <= slot)
        read = [heads.from_state.weight @ hidden[0, t]]
        read += [heads.from_token.weight @ future[0, t, place] for place in range(1 + first)]
        read += [heads.mask] * (slots - first)
        said = unmasked_attention(heads, torch.stack(read))[2 + slot]
        assert_same(states[slot + 1][0, t], naive.rms_norm(said, heads.norm.weight))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_formula_of_operations_is_what_runs(num_steps: int) -> None:
    heads, hidden, future = build(5, num_steps), torch.randn(2, 6, WIDTH).double(), torch.randn(2, 3, 4, WIDTH).double()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        heads(hidden, future=future, positions=torch.tensor([[0, 2, 5]] * 2))
    assert counter.get_total_flops() == 2 * heads.flops(6, 3)


@pytest.mark.parametrize("name", ["d_model", "num_horizons", "num_heads", "num_steps", "num_layers", "embedding_width"])
def test_sizes_must_be_at_least_one(name: str) -> None:
    sizes = {"d_model": 8, "num_horizons": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=rf"^BlockDiffusionHeads: {name} must be at least 1, got 0\.$"):
        BlockDiffusionHeads(**{**sizes, name: 0})


def test_there_is_something_to_denoise_in_every_step() -> None:
    with pytest.raises(
        ValueError, match=r"^BlockDiffusionHeads: num_steps must lie in 1\.\.3 for 4 horizons, got 4\.$"
    ):
        build(4, 4)


def test_future_is_needed() -> None:
    with pytest.raises(ValueError, match=r"^BlockDiffusionHeads: future is missing; pass the embeddings"):
        make_heads("block_diffusion", 2)(torch.zeros(1, 3, WIDTH).double())


def emitted_probs(drafts: Tensor, said: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the distribution of two tokens that come out of rejection sampling, summed over all that may be drafted.

    Args:
        drafts: ``(V, V)``, with what probability each pair is drafted.
        said: Law of the first and of the second draft, ``(V, V, V)`` each: the pair that is drafted, and the token.
        target: Law of the first token, and of the second after each first.
    """
    size = len(drafts)
    probs = torch.zeros_like(drafts)
    for one, other in itertools.product(range(size), repeat=2):
        first, second = said[0][one, other], said[1][one, other]
        kept = drafts[one, other] * (target[0][one] / first[one]).clamp(max=1.0)
        over = (target[0] - first).clamp(min=0)
        over = over / over.sum() if over.sum() > 0 else target[0]
        probs += (drafts[one, other] - kept) * over[:, None] * target[1]
        held = kept * (target[1][one, other] / second[other]).clamp(max=1.0)
        over = (target[1][one] - second).clamp(min=0)
        over = over / over.sum() if over.sum() > 0 else target[1][one]
        probs[one, other] += held
        probs[one] += (kept - held) * over
    return probs


def test_a_draft_s_distribution_must_be_its_distribution_given_the_drafts_before_it() -> None:
    """From left to right rejection sampling is exact; with the last place unmasked first it is not.

    There the last token was sampled from another distribution than its own given the first, which came later and saw
    it.
    """
    generator, size = torch.Generator().manual_seed(0), 4

    def all_probs(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, size, generator=generator, dtype=torch.float64)).softmax(dim=-1)

    target = all_probs(), all_probs(size)
    wanted = target[0][:, None] * target[1]
    first, second = all_probs(), all_probs(size)
    whole = torch.ones(size, size, size, dtype=torch.float64)
    in_order = (first * whole, second[:, None] * whole)
    assert_same(emitted_probs(first[:, None] * second, in_order, target), wanted, tolerance=1e-12)
    last, then = all_probs(), all_probs(size)  # the first token's distribution, given the last
    backwards = (then[None] * whole, last * whole)
    found = emitted_probs(then.T * last, backwards, target)
    assert_same(found.sum(), wanted.sum())
    assert (found - wanted).abs().max() > 0.01
    joint = then.T * last
    by_bayes = (joint.sum(dim=1) * whole, (joint / joint.sum(dim=1, keepdim=True))[:, None] * whole)
    assert_same(emitted_probs(joint, by_bayes, target), wanted, tolerance=1e-12)
