"""Tiny float64 models: every trunk with every kind of heads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mtp_modules import (
    LinearHeads,
    MTPModel,
    ParallelHeads,
    RecurrentHeads,
    RecurrentTrunk,
    ResidualHeads,
    SequentialHeads,
    TransformerTrunk,
)
from mtp_modules.core import DecodingState, Heads, Trunk

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
    )


def _recurrent(cell: str) -> Trunk:
    return RecurrentTrunk(vocab_size=VOCAB, d_model=WIDTH, cell=cell, num_layers=2)


TRUNKS: dict[str, Callable[[], Trunk]] = {
    "transformer": lambda: _transformer(None),
    "transformer_grouped": lambda: _transformer(2),
    "transformer_previous": lambda: _transformer(None, num_previous=2),
    "rnn": lambda: _recurrent("rnn"),
    "gru": lambda: _recurrent("gru"),
    "lstm": lambda: _recurrent("lstm"),
}


def _sequential(num_horizons: int, **options: bool) -> Heads:
    return SequentialHeads(
        d_model=WIDTH,
        num_horizons=num_horizons,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=12,
        max_positions=MAX_POSITIONS,
        **options,
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
        num_horizons, shared=True, chain_norm=True, embedding_first=False
    ),
}

TRUNKS_WITH_HEADS = [pytest.param(trunk, heads, id=f"{trunk}-{heads}") for trunk in TRUNKS for heads in HEADS]
"""For ``@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)``."""


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
    """Build one of ``HEADS`` in float64."""
    with float64():
        heads = HEADS[name](num_horizons)
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
    draft_tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> MTPModel:
    """Build one of ``TRUNKS`` with one of ``HEADS`` in float64; drafts trimmed if tokens are given for them."""
    with float64():
        model = MTPModel(
            trunk=TRUNKS[trunk](),
            heads=HEADS[heads](num_horizons),
            tie_embeddings=tied,
            own_unembeddings=own,
            output_bias=bias,
            num_draft_tokens=None if draft_tokens is None or num_horizons == 1 else len(draft_tokens),
        )
    if draft_tokens is not None and num_horizons > 1:
        model.trim_drafts(draft_tokens)
    randomise(model, seed)
    return model


def extend(model: MTPModel, tokens: Tensor, state: DecodingState, heads_state: DecodingState) -> tuple[Tensor, Tensor]:
    """Append a chunk to the states of trunk and heads; return the hidden states and those of horizon 1."""
    embed = model.trunk.embedding
    hidden = model.trunk(tokens, state=state).hidden
    return hidden, model.heads.extend(hidden, heads_state, tokens=tokens, embed=embed)


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
