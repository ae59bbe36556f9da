"""The transition between neighbours against its equation, and what it does not go with."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_modules import JointHeads, LinearHeads, MTPModel, MultiTokenLoss, TransformerTrunk, TransitionHeads
from mtp_modules.configuration import assemble
from mtp_modules.core import Heads
from mtp_modules.losses import NaiveLinearCrossEntropy
from mtp_modules.training import training_flops
from mtp_modules.training.freezing import freeze_parts
from tests.helpers import HEADS, VOCAB, WIDTH, assert_same, float64, make_model, make_trunk, random_tokens

ROWS, LENGTH, HORIZONS = 2, 5, 4


@pytest.mark.parametrize("name", ["transition", "transition_whole", "transition_denoised", "transition_leap"])
@pytest.mark.parametrize("draft_tokens", [None, [1, 4, 7]])
def test_logits_are_those_of_the_heads_and_the_bias_of_the_token_before(
    name: str, draft_tokens: list[int] | None
) -> None:
    model = make_model("transformer", name, HORIZONS, own=True, bias=True, draft_tokens=draft_tokens)
    tokens, inner = random_tokens(ROWS, LENGTH + model.lookahead), model.heads.heads
    hidden = model.trunk(tokens[:, :LENGTH]).hidden
    between = torch.stack([tokens[:, t + 1 : t + model.lookahead] for t in range(LENGTH)], dim=1)
    plain = inner(hidden, future=model.trunk.embedding(between))
    previous = torch.eye(VOCAB).double() if model.heads.previous is None else model.heads.previous.weight
    scored = list(range(VOCAB)) if draft_tokens is None else draft_tokens
    states = model(tokens)
    assert_same(states[0], plain[0])
    for index, b, t in itertools.product(range(1, HORIZONS), range(ROWS), range(LENGTH)):
        weight, bias = model.unembedding.matrix(index)
        token_before = tokens[b, t + model.horizons[index] - 1]
        wanted = weight @ plain[index][b, t] + bias + model.unembedding.transition @ previous[token_before]
        assert_same(model.unembedding.logits(states[index][b, t], index)[scored], wanted)


def test_drafts_are_at_first_those_of_the_heads() -> None:
    torch.manual_seed(0)
    with float64():
        heads = TransitionHeads(heads=LinearHeads(d_model=WIDTH, num_horizons=3), vocab_size=VOCAB, rank=2)
        model = MTPModel(trunk=make_trunk("transformer"), heads=heads)
    assert not model.unembedding.transition.any()
    assert float(heads.previous.weight.detach().square().sum(dim=1).mean()) == pytest.approx(1.0, abs=0.5)
    tokens = random_tokens(2, 8)
    hidden = model.trunk(tokens[:, :5]).hidden
    for index, (wide, plain) in enumerate(zip(model(tokens), heads.heads(hidden), strict=True)):
        assert_same(model.unembedding.logits(wide, index), model.unembedding.logits(plain[..., :WIDTH], 0))
    MultiTokenLoss()(model, tokens).loss.backward()
    assert model.unembedding.transition.grad.abs().min() > 0


def test_a_transition_learns_pairs_that_heads_alone_cannot() -> None:
    """After any text come two equal tokens, each of 4 equally often: the second costs log 4 nats, or nothing."""
    pairs = torch.randint(4, (64, 3), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
    found = []
    for ranks in ([], [4]):
        torch.manual_seed(1)
        heads: Heads = LinearHeads(d_model=WIDTH, num_horizons=2)
        for rank in ranks:
            heads = TransitionHeads(heads=heads, vocab_size=VOCAB, rank=rank)
        trunk = TransformerTrunk(vocab_size=VOCAB, d_model=WIDTH, num_layers=1, num_heads=1, max_positions=8)
        model = MTPModel(trunk=trunk, heads=heads)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        mask = torch.tensor([False, False, False, False, False, True]).expand(64, -1)  # predicted from position 3
        for _ in range(40):
            loss = MultiTokenLoss()(model, pairs, loss_mask=mask)
            optimizer.zero_grad()
            loss.loss.backward()
            optimizer.step()
        found.append(float(loss.nll[1]))
    assert found[0] > 1.0  # log 4 is 1.39, less what 64 texts learned by heart are worth
    assert found[1] < 0.2


@pytest.mark.parametrize("detach", [[], ["unembedding"]])
def test_what_horizons_share_is_one_matrix_for_the_backend(detach: list[str]) -> None:
    seen: list[list[int]] = []

    class Watching(NaiveLinearCrossEntropy):
        def __call__(self, *arguments: object, **options: object) -> object:
            seen.append([id(matrix.weight) for matrix in arguments[1]])
            return super().__call__(*arguments, **options)

    model = make_model("gru", "transition", 3)
    loss = MultiTokenLoss(backend=Watching(), detach=detach)(model, random_tokens(2, 8), weights=[0.0, 1.0, 1.0]).loss
    near, *far = seen[0]
    assert len(set(far)) == 1
    assert (near in far) == (not detach)
    loss.backward()
    assert model.unembedding.transition.grad.abs().min() > 0


def test_the_formula_of_operations_is_what_runs_but_for_horizon_1_s_zeros() -> None:
    model, tokens = make_model("gru", "transition", 3), random_tokens(ROWS, LENGTH + 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        MultiTokenLoss(backend=NaiveLinearCrossEntropy())(model, tokens)
    zeros = 2 * ROWS * LENGTH * VOCAB * model.heads.rank
    assert counter.get_total_flops() == training_flops(model, batch_size=ROWS, length=LENGTH) // 3 + zeros


def test_trimming_keeps_what_is_known_of_a_token() -> None:
    model = make_model("gru", "transition", 3)
    whole = model.unembedding.transition.detach().clone()
    model.trim_drafts([2, 3, 9])
    assert_same(model.unembedding.transition.detach(), whole[[2, 3, 9]], tolerance=0)
    model.trim_drafts([3, 5])
    assert_same(model.unembedding.transition.detach(), torch.stack((whole[3], torch.zeros(3).double())), tolerance=0)


@pytest.mark.parametrize(("freeze", "trained"), [(["trunk", "unembedding"], True), (["heads"], False), ([], True)])
def test_a_transition_is_frozen_with_the_heads(freeze: list[str], trained: bool) -> None:
    model = make_model("gru", "transition", 3, tied=False)
    freeze_parts(None, model, freeze)
    assert model.unembedding.transition.requires_grad == model.heads.previous.weight.requires_grad == trained
    assert model.unembedding.weight.requires_grad == ("unembedding" not in freeze)


def test_one_horizon_has_no_transition() -> None:
    model = make_model("gru", "transition", 1)
    assert model.unembedding.transition is model.heads.previous is None
    assert [state.shape for state in model(random_tokens(1, 4))] == [(1, 3, WIDTH)]


def test_sizes_are_filled_in_from_the_trunk() -> None:
    inner = {"class_path": "RecurrentHeads", "init_args": {"num_horizons": 3}}
    heads = {"class_path": "TransitionHeads", "init_args": {"rank": 2, "heads": inner}}
    trunk = {"class_path": "RecurrentTrunk", "init_args": {"vocab_size": 256, "d_model": 8}}
    data = {"class_path": "TextDataModule", "init_args": {"sources": ["README.md"], "window": 8, "batch_size": 1}}
    model = {"trunk": trunk, "heads": heads, "loss": {"class_path": "MultiTokenLoss"}}
    made = assemble(model, data)[0].model
    assert (made.heads.d_model, made.heads.vocab_size, made.heads.heads.embedding_width) == (8, 256, 8)
    inner["init_args"]["d_model"] = 9
    with pytest.raises(
        ValueError, match=r"^model\.heads\.init_args\.heads\.init_args\.d_model: is 9 here, but model\."
    ):
        assemble(model, data)


def linear() -> Heads:
    return LinearHeads(d_model=8, num_horizons=3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vocab_size": 0}, r"vocab_size must be at least 1, got 0\."),
        ({"rank": 0}, r"rank must be at least 1, got 0\."),
        ({"rank": 9}, r"rank must be below vocab_size=9, got 9; set it to null \(None\) for the whole matrix, which"),
        (
            {"heads": JointHeads(d_model=8, num_horizons=3, num_components=2)},
            r"heads must have one state per horizon, but JointHeads have a mixture of 2; use them as they are\.",
        ),
        (
            {"heads": TransitionHeads(heads=linear(), vocab_size=9, rank=2)},
            r"heads must have no transition yet, got TransitionHeads with one; leave one out\.",
        ),
    ],
)
def test_what_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^TransitionHeads: {sentence}"):
        TransitionHeads(**({"heads": linear(), "vocab_size": 9, "rank": 2} | options))


def test_the_ids_of_the_tokens_between_are_needed() -> None:
    heads = TransitionHeads(heads=linear(), vocab_size=9, rank=2)
    with pytest.raises(
        ValueError, match=r"^TransitionHeads: future_tokens is missing; pass the ids of the next tokens"
    ):
        heads(torch.zeros(1, 3, 8))


def test_another_vocabulary_is_refused() -> None:
    trunk = TransformerTrunk(vocab_size=10, d_model=8, num_layers=1, num_heads=1)
    with pytest.raises(
        ValueError, match=r"^MTPModel: TransitionHeads was built for vocab_size=9, but TransformerTrunk"
    ):
        MTPModel(trunk=trunk, heads=TransitionHeads(heads=linear(), vocab_size=9, rank=2))


def test_every_kind_of_heads_can_have_one() -> None:
    for name, make in HEADS.items():
        with float64():
            heads = TransitionHeads(heads=make(3), vocab_size=VOCAB, rank=2)
            model = MTPModel(trunk=make_trunk("transformer"), heads=heads)
        assert MultiTokenLoss()(model, random_tokens(1, 9)).loss.isfinite(), name
