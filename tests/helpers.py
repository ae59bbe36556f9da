"""Tiny float64 models: every trunk with every kind of heads."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import mtp_modules.heads
from mtp_modules import (
    BlockDiffusionHeads,
    ChainedHeads,
    ConditionedHeads,
    ConfidenceHeads,
    ContextBlockHeads,
    EarlyExitHeads,
    FusedFeatureHeads,
    JointHeads,
    LinearHeads,
    MTPModel,
    ParallelHeads,
    RecurrentHeads,
    RecurrentTrunk,
    ResidualHeads,
    SequentialHeads,
    TransformerTrunk,
    TransitionHeads,
)
from mtp_modules.core import DecodingState, Heads, MixtureStates, Trunk, TrunkOutput
from mtp_modules.decoders import Round

VOCAB = 11
WIDTH = 8
MAX_POSITIONS = 48


def _transformer(num_kv_heads: int | None, num_previous: int = 0, head_dim: int | None = None) -> Trunk:
    return TransformerTrunk(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_width=12,
        max_positions=MAX_POSITIONS,
        num_previous=num_previous,
        head_dim=head_dim,
        feature_layers=[0, 1],
    )


def _recurrent(cell: str) -> Trunk:
    return RecurrentTrunk(vocab_size=VOCAB, d_model=WIDTH, cell=cell, num_layers=2, feature_layers=[0, 1])


TRUNKS: dict[str, Callable[[], Trunk]] = {
    "transformer": lambda: _transformer(None),
    "transformer_grouped": lambda: _transformer(2),
    "transformer_previous": lambda: _transformer(None, num_previous=2, head_dim=6),
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


def _block_diffusion(num_horizons: int, num_steps: int) -> Heads:
    return BlockDiffusionHeads(
        d_model=WIDTH, num_horizons=num_horizons, num_heads=2, num_steps=num_steps, num_layers=2, ffn_width=12
    )


def _context_block(num_horizons: int) -> Heads:
    return ContextBlockHeads(
        d_model=WIDTH,
        num_horizons=num_horizons,
        num_heads=4,
        num_features=2,
        num_kv_heads=2,
        ffn_width=12,
        max_positions=MAX_POSITIONS,
    )


HEADS: dict[str, Callable[[int], Heads]] = {
    "linear": lambda num_horizons: LinearHeads(d_model=WIDTH, num_horizons=num_horizons),
    "parallel": lambda num_horizons: ParallelHeads(
        d_model=WIDTH, num_horizons=num_horizons, num_heads=2, num_kv_heads=1, ffn_width=12, max_positions=MAX_POSITIONS
    ),
    "recurrent": lambda num_horizons: RecurrentHeads(d_model=WIDTH, num_horizons=num_horizons, width=6),
    "block_diffusion": lambda num_horizons: _block_diffusion(num_horizons, max(1, num_horizons - 1)),
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
"""Those that return one state a horizon."""

JOINT: dict[str, Callable[[int], Heads]] = {
    "joint": lambda num_horizons: JointHeads(d_model=WIDTH, num_horizons=num_horizons, num_components=3, width=6),
}
"""Those that return a mixture."""

FEATURE_READERS: dict[str, Callable[[int], Heads]] = {
    "fused": lambda num_horizons: FusedFeatureHeads(
        d_model=WIDTH,
        num_horizons=num_horizons,
        num_heads=4,
        num_features=2,
        num_kv_heads=2,
        ffn_width=12,
        max_positions=MAX_POSITIONS,
    ),
    "eagle": lambda num_horizons: FusedFeatureHeads(
        d_model=WIDTH,
        num_horizons=num_horizons,
        num_heads=4,
        num_features=2,
        num_kv_heads=2,
        ffn_width=12,
        max_positions=MAX_POSITIONS,
        merge=False,
        norm_before_residual=True,
        fc_norm=True,
        norm_output=True,
    ),
    "context_block": _context_block,
    "context_transition": lambda num_horizons: TransitionHeads(
        heads=_context_block(num_horizons), vocab_size=VOCAB, rank=3
    ),
}
"""Those that read inner layers of the trunk, and so go with a trunk only."""

IN_FEWER_STEPS: dict[str, Callable[[int], Heads]] = {
    "block_diffusion_few": lambda num_horizons: _block_diffusion(num_horizons, max(1, (num_horizons - 1) // 2)),
}
"""Those that do not read all the tokens between."""


def _transition(heads: str, num_horizons: int, rank: int | None) -> Heads:
    return TransitionHeads(heads=HEADS[heads](num_horizons), vocab_size=VOCAB, rank=rank)


WRAPPED: dict[str, Callable[[int], Heads]] = {
    "transition": lambda num_horizons: _transition("linear", num_horizons, 3),
    "transition_whole": lambda num_horizons: _transition("parallel", num_horizons, None),
    "transition_denoised": lambda num_horizons: _transition("block_diffusion", num_horizons, 2),
}
"""Those that add something to other heads."""

CONFIDENT: dict[str, Callable[[int], Heads]] = {
    "confident": lambda num_horizons: ConfidenceHeads(heads=WRAPPED["transition"](num_horizons)),
}
"""Those that predict which drafts are accepted, and so have one loss more."""

LEAPS: dict[str, Callable[[int], Heads]] = {
    "linear_leap": lambda num_horizons: LinearHeads(d_model=WIDTH, num_horizons=num_horizons, stride=2),
    "residual_leap": lambda num_horizons: ResidualHeads(d_model=WIDTH, num_horizons=num_horizons, stride=4),
    "parallel_leap": lambda num_horizons: ParallelHeads(
        d_model=WIDTH, num_horizons=num_horizons, num_heads=2, ffn_width=12, max_positions=MAX_POSITIONS, stride=3
    ),
    "transition_leap": lambda num_horizons: TransitionHeads(
        heads=LinearHeads(d_model=WIDTH, num_horizons=num_horizons, stride=2), vocab_size=VOCAB, rank=2
    ),
}
"""Heads whose horizons are not 1 .. H."""


def of_usual_sizes(
    kinds: Iterable[type[Heads]], known: Iterable[Callable[[int], Heads]]
) -> dict[str, Callable[[int], Heads]]:
    """Return how to build, by name, those kinds of heads that none of the known ones is, from width and horizons."""
    with torch.random.fork_rng(devices=[]):
        have = {type(make(2)) for make in known}
    return {
        kind.__name__: lambda num_horizons, kind=kind: kind(d_model=WIDTH, num_horizons=num_horizons)
        for kind in kinds
        if kind not in have
    }


OTHERS = of_usual_sizes(
    [getattr(mtp_modules.heads, name) for name in mtp_modules.heads.__all__],
    [*HEADS.values(), *JOINT.values(), *FEATURE_READERS.values(), *WRAPPED.values(), *CONFIDENT.values()],
)
"""Exported heads that nothing above names; they need no more than width and horizons."""

HEADS |= OTHERS

WITH_TWO_TRUNKS = ("causal", "anticausal", "conditioned", "early_exit", "block_diffusion")
"""Heads that are tried with one trunk of each family; what differs between trunks, the others show."""

SCORED = HEADS | WRAPPED
"""Those that the loss scores state by state, and that need no inner layers."""

EVERY_HEADS = SCORED | CONFIDENT | JOINT | FEATURE_READERS | IN_FEWER_STEPS

TWO_TRUNKS = ("transformer_previous", "gru")
"""Enough for heads whose states hold what those of others hold."""

COVER = {
    "transformer": ("linear", "parallel", "residual", "sequential", *OTHERS),
    "transformer_grouped": ("recurrent", "linear_leap", "parallel_leap"),
    "transformer_previous": (
        *("sequential_shared", "causal", "conditioned", "fused", "eagle", "context_block"),
        *("block_diffusion", "block_diffusion_few", "transition_whole", "transition_denoised"),
    ),
    "rnn": ("parallel",),
    "gru": (
        *("linear", "recurrent", "anticausal", "early_exit", "joint", "context_transition"),
        *("residual_leap", "transition", "transition_leap", "confident", *OTHERS),
    ),
    "lstm": ("sequential",),
}
"""Every trunk and every kind of heads at least once.

Both families of trunks meet heads without memory, with keys and values, with tokens to read and with inner layers.
"""


def covering(*axes: Iterable[Hashable], strength: int = 2) -> list[pytest.ParameterSet]:
    """Return the product of some axes; what is not needed to have every ``strength`` values together is for nightly."""
    product = list(itertools.product(*axes))
    meets = {values: set(itertools.combinations(enumerate(values), strength)) for values in product}
    missing, chosen = set().union(*meets.values()), set()
    while missing:
        best = max(product, key=lambda values: len(meets[values] & missing))
        chosen.add(best)
        missing -= meets[best]
    return [pytest.param(*values, marks=() if values in chosen else pytest.mark.nightly) for values in product]


def pairs(trunks: Iterable[str], heads: Iterable[str]) -> list[pytest.ParameterSet]:
    """Return every trunk with every kind of heads; what is not in ``COVER`` is left to the nightly session."""
    heads = list(heads)
    return [
        pytest.param(
            *(trunk, head), id=f"{trunk}-{head}", marks=() if head in COVER.get(trunk, ()) else pytest.mark.nightly
        )
        for trunk in trunks
        for head in heads
    ]


TRUNKS_WITH_HEADS = [
    *pairs(TRUNKS, [name for name in HEADS if name not in WITH_TWO_TRUNKS]),
    *pairs(TWO_TRUNKS, WITH_TWO_TRUNKS),
]
"""For ``@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)``."""

TRUNKS_WITH_EVERY_HEADS = [*TRUNKS_WITH_HEADS, *pairs(TWO_TRUNKS, [name for name in EVERY_HEADS if name not in HEADS])]
TRUNKS_WITH_LEAPS = pairs(("transformer_grouped", "gru"), LEAPS)


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
    """Build one of ``EVERY_HEADS`` or ``LEAPS`` in float64."""
    with float64():
        heads = (EVERY_HEADS | LEAPS)[name](num_horizons)
    randomise(heads, seed)
    return heads


def lists_of(rounds: Iterable[Round]) -> list[tuple]:
    """Return what rounds tell, for comparisons."""
    return [(done.rows, done.tokens, done.accepted, done.drafted, done.finish_reasons) for done in rounds]


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
    """Build one of ``TRUNKS`` with one of ``EVERY_HEADS`` or ``LEAPS`` in float64; drafts trimmed if asked for."""
    with float64():
        model = MTPModel(
            trunk=TRUNKS[trunk](),
            heads=(EVERY_HEADS | LEAPS)[heads](num_horizons),
            tie_embeddings=tied,
            own_unembeddings=own,
            output_bias=bias,
            num_draft_tokens=None if draft_tokens is None or num_horizons == 1 else len(draft_tokens),
        )
    if draft_tokens is not None and num_horizons > 1:
        model.trim_drafts(draft_tokens)
    randomise(model, seed)
    return model.eval()


def extend(model: MTPModel, tokens: Tensor, state: DecodingState, heads_state: DecodingState) -> tuple[Tensor, Tensor]:
    """Append a chunk to the states of trunk and heads; return the hidden states and those of horizon 1."""
    output = model.trunk(tokens, state=state)
    return output.hidden, extend_heads(model, output, tokens, heads_state)


def extend_heads(model: MTPModel, output: TrunkOutput, tokens: Tensor, state: DecodingState) -> Tensor:
    """Append a chunk that the trunk has read to the state of the heads; return the states of horizon 1."""
    given = model.heads.features_of(output)
    return model.heads.extend(output.hidden, state, tokens=tokens, embed=model.trunk.embedding, **given)


def log_probs_of(model: MTPModel, tokens: Tensor, document_ids: Tensor | None = None) -> list[Tensor]:
    """Return each horizon's log-probabilities at every position, the tokens between being those of the text."""
    states, unembed = model(tokens, document_ids=document_ids), model.unembedding.logits
    if not isinstance(states, MixtureStates):
        return [unembed(state, index).log_softmax(dim=-1) for index, state in enumerate(states)]
    found, length = [unembed(states.first).log_softmax(dim=-1)], states.first.shape[1]
    weights = states.log_weights.exp()
    for index, components in enumerate(states.components.unbind(dim=2), start=1):
        all_probs = unembed(components, index).softmax(dim=-1)
        found.append((weights[..., None] * all_probs).sum(dim=2).log())
        token = tokens[:, index + 1 : index + 1 + length, None, None].expand(-1, -1, weights.shape[2], -1)
        weights = weights * all_probs.gather(3, token)[..., 0]
        weights = weights / weights.sum(dim=2, keepdim=True)
    return found


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
