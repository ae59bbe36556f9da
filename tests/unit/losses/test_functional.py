"""The loss of states and logits that another model has computed."""

from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules import GeometricWeights, MultiTokenLoss, multi_token_loss
from mtp_modules.losses import NaiveLinearCrossEntropy
from tests.helpers import VOCAB, WIDTH, assert_same, gradients, make_model, random_tokens
from tests.reference import loss as naive

WEIGHTS = [1.0, 0.5, 0.25]
IMITATION = [
    {},
    {"distillation": 0.3},
    {"distillation": 0.9, "total_variation": 0.8, "log_acceptance": True},
    {"distillation": 0.9, "total_variation": 1.0, "lk_eta": 3.0},
]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong types and shapes reach the checks of the functions themselves."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def computed(length: int = 6, horizons: int = 3) -> tuple[nn.Module, list[Tensor]]:
    """Return states of a model that is not ours, and the module that owns what they are made of."""
    owner = nn.Module()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

    owner.states = nn.ParameterList(drawn(2, length, WIDTH) for _ in range(horizons))
    owner.matrix, owner.bias = drawn(VOCAB, WIDTH), drawn(VOCAB)
    return owner, list(owner.states)


def twin(owner: nn.Module, tokens: Tensor, horizons: tuple[int, ...], **options: object) -> Tensor:
    """Return the triple loop over the same states."""
    unembedding = SimpleNamespace(logits=lambda state, _=0: F.linear(state, owner.matrix, owner.bias))
    states = list(owner.states)
    model = type("Model", (), {"horizons": horizons, "unembedding": unembedding, "__call__": lambda *_, **__: states})
    return naive.multi_token_loss(model(), tokens, WEIGHTS, **options)


@pytest.mark.parametrize("horizons", [(1, 2, 3), (1, 3, 4)])
@pytest.mark.parametrize("imitation", IMITATION)
@pytest.mark.parametrize("known", [0, 1, 3])
def test_states_and_logits_are_scored_as_the_triple_loop_does(
    horizons: tuple[int, ...], imitation: dict[str, float], known: int
) -> None:
    """Also where the tokens end with the states, so that far horizons miss targets."""
    owner, states = computed()
    tokens = random_tokens(2, 6 + known)
    documents = torch.tensor([[0] * 3 + [1] * (3 + known), [0] * (6 + known)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 4] = False
    options = {"document_ids": documents, "loss_mask": mask}
    ahead = max(horizons) - known
    longer = F.pad(tokens, (0, ahead), value=0)
    wide = {"document_ids": F.pad(documents, (0, ahead), value=9), "loss_mask": F.pad(mask, (0, ahead), value=False)}
    wanted = twin(owner, longer, horizons, **wide, **imitation)
    expected = gradients(owner, wanted)
    given = {"horizons": horizons, "weights": WEIGHTS, **options, **imitation}
    logits = [F.linear(state, owner.matrix, owner.bias) for state in states]
    for found in (
        multi_token_loss(states, tokens, matrix=owner.matrix, bias=owner.bias, **given),
        multi_token_loss(logits, tokens, **given),
    ):
        assert_same(found.loss, wanted)
        assert_same(gradients(owner, found.loss), expected)


@pytest.mark.parametrize("backend", [None, NaiveLinearCrossEntropy()])
@pytest.mark.parametrize("imitation", IMITATION)
def test_all_terms_are_those_of_the_class(backend: object, imitation: dict[str, float]) -> None:
    model, tokens = make_model("gru", "recurrent", 3, tied=False, own=True, bias=True), random_tokens(2, 9)
    weights, smooth = GeometricWeights(gamma=0.5), {"label_smoothing": 0.1, "z_loss": 0.01}
    counts = torch.tensor([40, 30, 20])
    class_ = MultiTokenLoss(weights=weights, **smooth, **imitation)
    wanted = class_(model, tokens, counts=counts)
    expected = gradients(model, wanted.loss)
    matrices, biases = zip(*(model.unembedding.matrix(index) for index in range(3)), strict=True)
    given = {"weights": weights, "counts": counts, **smooth, **imitation}
    logits = [model.unembedding.logits(state, index) for index, state in enumerate(model(tokens))]
    for found in (
        multi_token_loss(model(tokens), tokens, matrix=matrices, bias=biases, backend=backend, **given),
        multi_token_loss(logits, tokens, **given),
    ):
        for name, value in vars(wanted).items():
            assert_same(getattr(found, name), value)
        assert_same(gradients(model, found.loss), expected)


def test_states_without_gradients_are_scored_too() -> None:
    owner, states = computed(horizons=2)
    tokens = random_tokens(2, 6)
    terms = multi_token_loss([state.detach() for state in states], tokens, matrix=owner.matrix.detach())
    assert terms.count.tolist() == [10, 8]
    logits = F.linear(states[0][:, :-1], owner.matrix)
    assert_same(terms.nll[0], F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).detach())


def test_half_precision_is_scored_in_float32() -> None:
    logits = [torch.full((1, 3, VOCAB), 3.0, dtype=torch.bfloat16)]
    assert multi_token_loss(logits, random_tokens(1, 3)).loss.dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
def test_the_class_says_where_states_go() -> None:
    with pytest.raises(
        ValueError,
        match=r"^MultiTokenLoss: model must have heads and an unembedding, as MTPModel has, got Tensor; states or "
        r"logits that another model has computed go to multi_token_loss\(states, tokens, matrix=\.\.\.\)",
    ):
        MultiTokenLoss()(torch.zeros(2, 6, WIDTH), random_tokens(2, 8))
    with pytest.raises(ValueError, match=r"got DataParallel; .* goes around a module that calls the loss"):
        MultiTokenLoss()(nn.DataParallel(make_model()), random_tokens(2, 8))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"states": torch.zeros(2, 6, 8)}, r"states must hold one \(B, T, D\) tensor per horizon, got one of shape"),
        ({"states": []}, r"states must hold one .* got \[\]\."),
        ({"states": [torch.zeros(2, 6, 8), torch.zeros(2, 5, 8)]}, r"states must hold one .* \(2, 5, 8\)\]\."),
        ({"horizons": (2, 3)}, r"horizons must ascend from 1, one for each of 2 states, got \[2, 3\]; give a horizon"),
        ({"horizons": (1,)}, r"horizons must ascend from 1, one for each of 2 states, got \[1\]"),
        (
            {"tokens": random_tokens(2, 5)},
            r"tokens must have the shape \(2, 6\), or up to 2 tokens more in each row, got",
        ),
        (
            {"tokens": random_tokens(2, 9)},
            r"tokens must have the shape \(2, 6\), .* got \(2, 9\); give the tokens that",
        ),
        ({"tokens": random_tokens(2, 6).float()}, r"tokens must be whole numbers, got torch\.float32; give the ids"),
        ({"tokens": torch.full((2, 6), 11)}, r"token 11 is outside the vocabulary 0\.\.10; mark"),
        (
            {"matrix": torch.zeros(8, 11)},
            r"matrix must have the shape \(V, 8\) for states of that width, got \(8, 11\)",
        ),
        (
            {"matrix": [torch.zeros(11, 8)]},
            r"matrix must be one 2-D tensor, or one for each of 2 states, got \[\(11, 8",
        ),
        ({"bias": torch.zeros(3)}, r"bias must hold 11 numbers, as matrix has rows, got 3\."),
        ({"bias": torch.zeros(8), "matrix": None}, r"bias needs a matrix; logits are taken as they are\."),
        ({"backend": NaiveLinearCrossEntropy(), "matrix": None}, r"backend needs a matrix"),
        ({"loss_mask": torch.ones(2, 7)}, r"loss_mask has shape \(2, 7\), tokens \(2, 6\); make them equal\."),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes: dict[str, object], sentence: str) -> None:
    given = {"states": [torch.zeros(2, 6, 8)] * 2, "tokens": random_tokens(2, 6), "matrix": torch.zeros(11, 8)}
    given |= changes
    with pytest.raises(ValueError, match=f"^multi_token_loss: {sentence}"):
        multi_token_loss(given.pop("states"), given.pop("tokens"), **given)
