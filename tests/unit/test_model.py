"""The composite: what it refuses, and its folder on disk."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mtp_modules import (
    Heads,
    LinearHeads,
    MTPModel,
    MultiTokenLoss,
    ParallelHeads,
    RecurrentHeads,
    RecurrentTrunk,
    ResidualHeads,
    Tokenizer,
    TransformerTrunk,
    Trunk,
    describe,
)
from tests.helpers import (
    EVERY_HEADS,
    TRUNKS_WITH_EVERY_HEADS,
    TRUNKS_WITH_HEADS,
    WIDTH,
    assert_same,
    float64,
    make_model,
    random_tokens,
)


class Letters(Tokenizer):
    """A tokenizer of this test."""

    def __init__(self, *, alphabet: str) -> None:
        self.alphabet = alphabet

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @property
    def end_token(self) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.alphabet[token] for token in tokens)


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_HEADS)
@pytest.mark.parametrize("num_horizons", [1, 2, 4])
def test_one_state_a_horizon_for_every_combination(trunk: str, heads: str, num_horizons: int) -> None:
    model = make_model(trunk, heads, num_horizons)
    assert model.lookahead == num_horizons
    assert model.horizons == tuple(range(1, num_horizons + 1))
    states = model(random_tokens(2, 5 + num_horizons))
    assert [state.shape for state in states] == [(2, 5, WIDTH)] * num_horizons


@pytest.mark.parametrize("heads", EVERY_HEADS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_every_parameter_has_a_gradient(heads: str, tied: bool, own: bool) -> None:
    model = make_model("gru", heads, 3, tied=tied, own=own, bias=own)
    MultiTokenLoss()(model, random_tokens(2, 8)).loss.backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert silent == []


OTHER_PRECISION = (
    r"^MTPModel: RecurrentTrunk is in bfloat16, but LinearHeads are in float32; call heads\.to\(torch\.bfloat16\) "
    r"before, or make the trunk in float32\.$"
)


def parts() -> tuple[Trunk, Heads]:
    return RecurrentTrunk(vocab_size=11, d_model=WIDTH), LinearHeads(d_model=WIDTH, num_horizons=3)


def test_heads_of_another_precision_than_the_trunk_are_refused() -> None:
    trunk, heads = parts()
    with pytest.raises(ValueError, match=OTHER_PRECISION):
        MTPModel(trunk=trunk.to(torch.bfloat16), heads=heads)
    with torch.device("meta"):
        trunk, heads = parts()
    with pytest.raises(ValueError, match=OTHER_PRECISION):
        MTPModel(trunk=trunk.to(torch.bfloat16), heads=heads)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_matrices_have_the_precision_of_the_trunk(dtype: torch.dtype, device: str) -> None:
    with torch.device(device):
        trunk, heads = parts()
        options = {"own_unembeddings": True, "output_bias": True, "num_draft_tokens": 4}
        model = MTPModel(trunk=trunk.to(dtype), heads=heads.to(dtype), **options)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.unembedding.draft_tokens.dtype == torch.long
    if device == "cpu":
        assert MultiTokenLoss()(model, random_tokens(2, 8)).loss.isfinite()


def test_a_model_may_change_its_precision_as_a_whole(tmp_path: Path) -> None:
    trunk, heads = parts()
    model = MTPModel(trunk=trunk, heads=heads).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded, _ = MTPModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_heads_without_parameters_go_with_every_precision() -> None:
    heads = ResidualHeads(d_model=WIDTH, num_horizons=1)
    assert list(heads.parameters()) == []
    model = MTPModel(trunk=parts()[0].to(torch.bfloat16), heads=heads)
    assert MultiTokenLoss()(model, random_tokens(2, 8)).loss.isfinite()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_models_have_one_matrix(tied: bool) -> None:
    model = make_model(tied=tied)
    assert (model.unembedding.weight is model.trunk.embedding.weight) == tied
    assert list(model.unembedding.state_dict()) == ["weight"]


@pytest.mark.parametrize("bias", [True, False])
def test_horizons_beyond_the_first_can_own_a_matrix(bias: bool) -> None:
    model = make_model(num_horizons=3, own=True, bias=bias)
    assert model.unembedding.weight is model.trunk.embedding.weight
    own = ["own_weights.0", "own_weights.1"] + (["own_biases.0", "own_biases.1"] if bias else [])
    assert sorted(model.unembedding.state_dict()) == sorted(["weight", *own] + (["bias"] if bias else []))
    given = describe(model)["init_args"]
    assert (given["own_unembeddings"], given["output_bias"]) == (True, bias)


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
def test_modules_can_be_built_without_memory_and_reset(trunk: str, heads: str) -> None:
    with torch.device("meta"):
        model = make_model(trunk, heads, 2, tied=False, own=True, bias=True)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(torch.nan)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize(("trunk", "heads"), TRUNKS_WITH_EVERY_HEADS)
@pytest.mark.parametrize(("tied", "own"), [(True, False), (False, False), (True, True)])
def test_a_saved_model_comes_back(trunk: str, heads: str, tied: bool, own: bool, tmp_path: Path) -> None:
    model, tokens = make_model(trunk, heads, 2, tied=tied, own=own, bias=own), random_tokens(1, 6)
    model.save_pretrained(tmp_path / "deep" / "folder")
    with float64():
        again, tokenizer = MTPModel.from_pretrained(tmp_path / "deep" / "folder")
    assert tokenizer is None
    assert not again.training
    assert (again.unembedding.weight is again.trunk.embedding.weight) == tied
    assert all(torch.equal(one, other) for one, other in zip(model(tokens), again(tokens), strict=True))
    assert_same(dict(again.state_dict()), dict(model.state_dict()), 0.0)


def test_a_tokenizer_comes_back_if_its_package_is_trusted(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, tokenizer=Letters(alphabet="abc"))
    with pytest.raises(ValueError, match=r"^build: class '.*Letters' is not from a trusted package"):
        MTPModel.from_pretrained(tmp_path)
    _, tokenizer = MTPModel.from_pretrained(tmp_path, trusted=("mtp_modules", "tests"))
    assert tokenizer.decode(tokenizer.encode("cab")) == "cab"


def test_what_is_saved_has_no_pickle(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def forget(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for part in ("trunk", "heads"):
        config["model"]["init_args"][part]["init_args"]["d_model"] = 2 * WIDTH
    del config["weights"]  # it is no longer the one that was saved with them
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (forget("config.json"), "MTPModel: .* has no config.json; give a folder that save_pretrained wrote."),
        (
            forget("model.safetensors"),
            "MTPModel: .* has no model.safetensors; give a folder that save_pretrained wrote.",
        ),
        (replace("config.json", "{}"), "MTPModel: .*config.json was not written by save_pretrained."),
        (
            replace("config.json", '{"mtp_modules": 1}'),
            "MTPModel: .* holds weights of format 1, this version reads format 2",
        ),
        (replace("config.json", "[1]"), "MTPModel: .*config.json was not written by save_pretrained."),
        (replace("config.json", "hello"), "MTPModel: .*config.json was not written by save_pretrained."),
        (replace("model.safetensors", "hello"), "MTPModel: .*model.safetensors is damaged"),
        (widen, "MTPModel: .*model.safetensors does not fit the model in config.json"),
    ],
)
def test_a_bad_folder_is_refused(damage: Callable, sentence: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        MTPModel.from_pretrained(tmp_path)


def gru(**sizes: object) -> RecurrentTrunk:
    return RecurrentTrunk(vocab_size=11, **{"d_model": 8, **sizes})


def reads_two_layers() -> Heads:
    heads = LinearHeads(d_model=8, num_horizons=2)
    heads.num_features = 2
    return heads


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: MTPModel(trunk=gru(), heads=LinearHeads(d_model=16, num_horizons=2)),
            "MTPModel: LinearHeads was built for d_model=16, but RecurrentTrunk has 8; make them equal.",
        ),
        (
            lambda: MTPModel(
                trunk=gru(embedding_width=4), heads=RecurrentHeads(d_model=8, num_horizons=2), tie_embeddings=False
            ),
            "MTPModel: RecurrentHeads was built for embedding_width=8, but RecurrentTrunk has 4; make them equal.",
        ),
        (
            lambda: MTPModel(trunk=gru(embedding_width=4), heads=LinearHeads(d_model=8, num_horizons=2)),
            "MTPModel: tie_embeddings needs an embedding as wide as the trunk (8), got 4; set tie_embeddings to false.",
        ),
        (
            lambda: MTPModel(
                trunk=TransformerTrunk(vocab_size=11, d_model=8, num_layers=1, num_heads=2, max_positions=9),
                heads=ParallelHeads(d_model=8, num_horizons=2, num_heads=2, max_positions=8),
            ),
            "MTPModel: ParallelHeads reads at most max_positions=8, TransformerTrunk 9; "
            "give the heads at least as many.",
        ),
        *(
            (
                lambda layers=layers: MTPModel(
                    trunk=gru(num_layers=3, feature_layers=layers), heads=reads_two_layers()
                ),
                f"MTPModel: LinearHeads reads 2 inner layers, but RecurrentTrunk has feature_layers={layers}; "
                "name 2 of its layers there.",
            )
            for layers in ([], [1], [0, 1, 2])
        ),
        (
            lambda: make_model()(torch.tensor([[1, 2, 3, 4, 11]])),
            "MTPModel: token 11 is outside the vocabulary 0..10; encode the text with the tokenizer that the model was "
            "trained with.",
        ),
        (
            lambda: make_model(num_horizons=3)(random_tokens(1, 3)),
            "future_targets: a row of 3 tokens leaves no position for horizon 3; give at least one token more than the "
            "largest horizon.",
        ),
    ],
)
def test_what_is_refused(make: Callable, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make()
