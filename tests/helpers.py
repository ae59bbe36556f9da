"""Tiny float64 models: every trunk with every kind of heads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mtp_modules import (
    ChainedHeads,
    ConditionedHeads,
    EarlyExitHeads,
    LinearHeads,
    MTPModel,
    ParallelHeads,
    RecurrentHeads,
    RecurrentTrunk,
    ResidualHeads,
    SequentialHeads,
    TransformerTrunk,
)
from mtp_modules.core import DecodingState, Heads, Trunk, TrunkOutput

VOCAB = 11
WIDTH = 8
MAX_POSITIONS = 48


def _transformer(num_kv_heads: int | None, num_previous: int = 0) -> Trunk:
    return TransformerTrunk(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_width=12,
        max_positions=MAX_POSITIONS,
        num_previous=num_previous,
        feature_layers=[0, 1],
    )


def _recurrent(cell: str) -> Trunk:
    return RecurrentTrunk(vocab_size=VOCAB, d_model=WIDTH, cell=cell, num_layers=2, feature_layers=[0, 1])


TRUNKS: dict[str, Callable[[], Trunk]] = {
    "transformer": lambda: _transformer(None),
    "transformer_grouped": lambda: _transformer(2),
    "transformer_previous": lambda: _transformer(None, num_previous=2),
    "rnn": lambda: _recurrent("rnn"),
    "gru": lambda: _recurrent("gru"),
    "lstm": lambda: _recurrent("lstm"),
}


def _sequential(num_horizons: int, **options: float) -> Heads:
    return SequentialHeads(
        d_model=WIDTH,
        num_horizons=num_horizons,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=12,
        max_positions=MAX_POSITIONS,
        **options,
    )


def _chained(num_horizons: int, order: str) -> Heads:
    return ChainedHeads(
        d_model=WIDTH,
        num_horizons=num_horizons,
        num_heads=4,
        order=order,
        num_kv_heads=2,
        ffn_width=8,
        max_positions=MAX_POSITIONS,
    )


HEADS: dict[str, Callable[[int], Heads]] = {
    "linear": lambda num_horizons: LinearHeads(d_model=WIDTH, num_horizons=num_horizons),
    "parallel": lambda num_horizons: ParallelHeads(
        d_model=WIDTH, num_horizons=num_horizons, num_heads=2, num_kv_heads=1, ffn_width=12, max_positions=MAX_POSITIONS
    ),
    "recurrent": lambda num_horizons: RecurrentHeads(d_model=WIDTH, num_horizons=num_horizons, width=6),
    "residual": lambda num_horizons: ResidualHeads(d_model=WIDTH, num_horizons=num_horizons, num_layers=2),
    "sequential": _sequential,
    "sequential_shared": lambda num_horizons: _sequential(
        num_horizons, shared=True, chain_norm=True, embedding_first=False, qk_norm=True
    ),
    "causal": lambda num_horizons: _chained(num_horizons, "causal"),
    "anticausal": lambda num_horizons: _chained(num_horizons, "anticausal"),
    "conditioned": lambda num_horizons: ConditionedHeads(
        d_model=WIDTH, num_horizons=num_horizons, width=6, num_layers=2
    ),
    "early_exit": lambda num_horizons: EarlyExitHeads(d_model=WIDTH, num_horizons=num_horizons, num_features=2),
}

LEAPS: dict[str, Callable[[int], Heads]] = {
    "linear_leap": lambda num_horizons: LinearHeads(d_model=WIDTH, num_horizons=num_horizons, stride=2),
    "residual_leap": lambda num_horizons: ResidualHeads(d_model=WIDTH, num_horizons=num_horizons, stride=4),
    "parallel_leap": lambda num_horizons: ParallelHeads(
        d_model=WIDTH, num_horizons=num_horizons, num_heads=2, ffn_width=12, max_positions=MAX_POSITIONS, stride=3
    ),
}
"""Heads whose horizons are not 1 .. H."""

WITH_TWO_TRUNKS = ("causal", "anticausal", "conditioned", "early_exit")
"""Heads that are tried with one trunk of each family; what differs between trunks, the others show."""

TRUNKS_WITH_HEADS = [
    pytest.param(trunk, heads, id=f"{trunk}-{heads}")
    for trunk in TRUNKS
    for heads in HEADS
    if heads not in WITH_TWO_TRUNKS or trunk in ("transformer_previous", "gru")
]
"""For ``@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)``."""

TRUNKS_WITH_LEAPS = [
    pytest.param(trunk, heads, id=f"{trunk}-{heads}") for trunk in ("transformer_grouped", "gru") for heads in LEAPS
]


@contextmanager
def float64() -> Iterator[None]:
    """Build modules in float64, tables of sines included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter large enough that each of them matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise + (1.0 if parameter.ndim == 1 else 0.0))


def make_trunk(name: str, *, seed: int = 0) -> Trunk:
    """Build one of ``TRUNKS`` in float64."""
    with float64():
        trunk = TRUNKS[name]()
    randomise(trunk, seed)
    return trunk


def make_heads(name: str, num_horizons: int, *, seed: int = 0) -> Heads:
    """Build one of ``HEADS`` or ``LEAPS`` in float64."""
    with float64():
        heads = (HEADS | LEAPS)[name](num_horizons)
    randomise(heads, seed)
    return heads


def make_model(
    trunk: str = "transformer",
    heads: str = "linear",
    num_horizons: int = 3,
    *,
    tied: bool = True,
    own: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> MTPModel:
    """Build one of ``TRUNKS`` with one of ``HEADS`` or ``LEAPS`` in float64."""
    with float64():
        model = MTPModel(
            trunk=TRUNKS[trunk](),
            heads=(HEADS | LEAPS)[heads](num_horizons),
            tie_embeddings=tied,
            own_unembeddings=own,
            output_bias=bias,
        )
    randomise(model, seed)
    return model


def extend(model: MTPModel, tokens: Tensor, state: DecodingState, heads_state: DecodingState) -> tuple[Tensor, Tensor]:
    """Append a chunk to the states of trunk and heads; return the hidden states and those of horizon 1."""
    output = model.trunk(tokens, state=state)
    return output.hidden, extend_heads(model, output, tokens, heads_state)


def extend_heads(model: MTPModel, output: TrunkOutput, tokens: Tensor, state: DecodingState) -> Tensor:
    """Append a chunk that the trunk has read to the state of the heads; return the states of horizon 1."""
    given = model.heads.features_of(output)
    return model.heads.extend(output.hidden, state, tokens=tokens, embed=model.trunk.embedding, **given)


def random_tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Draw token ids."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter by name; zeros where there is none."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def assert_same(actual: object, expected: object, tolerance: float = 1e-10) -> None:
    """Compare tensors, or dictionaries of tensors, to within an absolute and relative ``tolerance``."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
