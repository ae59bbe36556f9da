"""The formulas of every component against a counter of the products that really run, forward and backward.

The naive backend is counted: torch's counter does not see the in-place product of the fused one.
"""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import (
    ChainedHeads,
    MTPModel,
    MultiTokenLoss,
    NaiveLinearCrossEntropy,
    ParallelHeads,
    RecurrentTrunk,
    SequentialHeads,
)
from mtp_modules.core.targets import num_sampled
from mtp_modules.training import flops_per_token, training_flops
from tests.helpers import HEADS, TRUNKS_WITH_HEADS, VOCAB, WIDTH, make_model, random_tokens

ROWS, LENGTH, HORIZONS = 2, 6, 3


def counted(model: MTPModel, loss: MultiTokenLoss) -> tuple[int, int]:
    """Return the operations of a forward pass and of a whole step."""
    tokens = random_tokens(ROWS, LENGTH + model.lookahead)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        terms = loss(model, tokens)
        forward = counter.get_total_flops()
        terms.loss.backward()
    return forward, counter.get_total_flops()


def wasted(model: MTPModel, share: float) -> int:
    """Return what is multiplied forward without need.

    Layers that are read out at some positions only still project all three of queries, keys and values, both
    everywhere and there: queries everywhere, and keys and values there, are thrown away. Of sequential and causal
    heads, that is the last; of anticausal heads none is.
    """
    heads = model.heads
    if share == 1.0 or not isinstance(heads, ChainedHeads | ParallelHeads | SequentialHeads):
        return 0
    if isinstance(heads, ChainedHeads) and heads.order == "anticausal":
        return 0
    parallel = isinstance(heads, ParallelHeads)
    qkv = (heads.steps[0].layer if isinstance(heads, SequentialHeads) else heads.layers[0]).attention.qkv
    keys_and_values = qkv.out_features - WIDTH
    unused = WIDTH * LENGTH + keys_and_values * num_sampled(LENGTH, share)
    return ROWS * (HORIZONS - 1 if parallel else 1) * 2 * WIDTH * unused


def empty_memories(model: MTPModel) -> int:
    """Return the products that a recurrent trunk saves backward: the empty memory before a row needs no gradient."""
    if not isinstance(model.trunk, RecurrentTrunk):
        return 0
    return 2 * ROWS * sum(layer.weight_hh_l0.numel() for layer in model.trunk.layers)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
def test_the_formula_is_what_runs(trunk: str, heads: str, share: float) -> None:
    model = make_model(trunk, heads, HORIZONS)
    loss = MultiTokenLoss(backend=NaiveLinearCrossEntropy(), share_of_positions=share)
    forward, step = counted(model, loss)
    expected = training_flops(model, batch_size=ROWS, length=LENGTH, share_of_positions=share)
    assert forward == expected // 3 + wasted(model, share)
    assert step == expected + 3 * wasted(model, share) - empty_memories(model)


@pytest.mark.parametrize("heads", list(HEADS))
def test_one_horizon_costs_no_more_than_it_must(heads: str) -> None:
    model = make_model("transformer", heads, 1)
    _, step = counted(model, MultiTokenLoss(backend=NaiveLinearCrossEntropy()))
    assert step == training_flops(model, batch_size=ROWS, length=LENGTH)


def test_a_tied_matrix_counts_once() -> None:
    tied, untied = (training_flops(make_model(tied=tied), batch_size=1, length=4) for tied in (True, False))
    assert tied == untied


def test_flops_per_token_grow_with_attention() -> None:
    model = make_model("transformer", "linear", HORIZONS)
    short, long = (flops_per_token(model, length=length) for length in (4, 8))
    layers, products = 2, 2
    assert long - short == 3 * 2 * layers * products * WIDTH * (8 - 4)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) + (HORIZONS - 1) * VOCAB * WIDTH
    assert short == 6 * (matrices + layers * products * WIDTH * 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 0}, r"^training_flops: batch_size must be at least 1, got 0\.$"),
        ({"length": 0}, r"^training_flops: length must be at least 1, got 0\.$"),
        ({"share_of_positions": 0.0}, r"^training_flops: share_of_positions must lie in \(0, 1\], got 0\.0\.$"),
    ],
)
def test_sizes_of_nothing_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        training_flops(make_model(), **({"batch_size": 1, "length": 4} | arguments))
