"""Components describe themselves as plain values, and are built again from them."""

import copy
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mtp_modules import (
    AuxiliaryWeights,
    ExplicitWeights,
    GeometricWeights,
    LinearHeads,
    MTPModel,
    MultiTokenLoss,
    SpeculativeDecoder,
    UniformWeights,
)
from mtp_modules.core import Component, build, describe
from mtp_modules.core.component import check_describable, redescribe
from mtp_modules.losses import NaiveLinearCrossEntropy
from mtp_modules.trunks import RecomputedTrunk
from tests.helpers import EVERY_HEADS, TRUNKS, make_heads, make_model, make_trunk

COMPONENTS = {
    **{f"trunk_{name}": lambda name=name: make_trunk(name) for name in TRUNKS},
    **{f"heads_{name}": lambda name=name: make_heads(name, 2) for name in EVERY_HEADS},
    "model": lambda: make_model("lstm", "recurrent", 2, tied=False),
    "loss": lambda: MultiTokenLoss(
        weights=GeometricWeights(gamma=0.5), backend=NaiveLinearCrossEntropy(), distillation=0.2
    ),
    "plain_loss": lambda: MultiTokenLoss(weights=None),
    "uniform": lambda: UniformWeights(preserve_total=True),
    "auxiliary": lambda: AuxiliaryWeights(weight=0.1),
    "explicit": lambda: ExplicitWeights(values=(1.0, 0.5)),
    "naive": NaiveLinearCrossEntropy,
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_description_is_json_and_builds_the_same_again(name: str) -> None:
    component = COMPONENTS[name]()
    description = json.loads(json.dumps(describe(component)))
    assert description == describe(component)
    again = build(description)
    assert type(again) is type(component)
    assert describe(again) == description


def test_a_description_holds_what_was_given_and_what_was_not() -> None:
    loss = MultiTokenLoss(weights=AuxiliaryWeights(weight=0.1), share_of_positions=0.25)
    assert describe(loss) == {
        "class_path": "mtp_modules.losses.multi_token.MultiTokenLoss",
        "init_args": {
            "weights": {
                "class_path": "mtp_modules.losses.weights.AuxiliaryWeights",
                "init_args": {"weight": 0.1, "decay": None},
            },
            "backend": None,
            "share_of_positions": 0.25,
            "distillation": 0.0,
            "total_variation": 0.0,
            "log_acceptance": False,
            "lk_eta": 0.0,
            "balance": 0.0,
            "confidence_target": "argmax",
            "detach": [],
            "label_smoothing": 0.0,
            "z_loss": 0.0,
        },
    }


class Shelf(Component):
    """Holds anything."""

    def __init__(self, *, things: object) -> None:
        self.things = things


class NamedShelf(Shelf):
    """Passes something else on than it was given."""

    def __init__(self, *, name: str) -> None:
        super().__init__(things=[name])


def test_values_that_are_not_plain_become_plain() -> None:
    shelf = Shelf(things={"where": Path("a") / "b", "many": (1, UniformWeights())})
    many = [1, {"class_path": "mtp_modules.losses.weights.UniformWeights", "init_args": {"preserve_total": False}}]
    assert describe(shelf)["init_args"] == {"things": {"where": str(Path("a") / "b"), "many": many}}
    again = build(describe(shelf), trusted=("mtp_modules", "tests"))
    assert isinstance(again.things["many"][1], UniformWeights)


def test_what_is_recorded_is_what_the_user_gave() -> None:
    assert describe(NamedShelf(name="top"))["init_args"] == {"name": "top"}


def test_what_is_recorded_does_not_change_with_the_argument() -> None:
    values = [1.0, 0.5]
    weights = ExplicitWeights(values=values)
    values.append(0.1)
    assert describe(weights)["init_args"] == {"values": [1.0, 0.5]}
    assert weights(2) == [1.0, 0.5]


class Numbers(Component, nn.Module):
    """A module with a parameter."""

    def __init__(self, *, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_description_is_no_attribute(name: str) -> None:
    component = COMPONENTS[name]()
    parts = list(component.modules()) if isinstance(component, nn.Module) else [component]
    assert not any("description" in attribute for part in parts for attribute in vars(part))
    assert vars(Shelf(things=3)) == {"things": 3}


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda thing, protocol=protocol: pickle.loads(pickle.dumps(thing, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_keeps_its_description_and_everything_else(copied: object) -> None:
    for original in (Shelf(things=[1, 2]), NamedShelf(name="top"), Numbers(size=2), make_model("lstm", "recurrent")):
        again = copied(original)
        assert type(again) is type(original)
        assert again is not original
        assert describe(again) == describe(original)
        assert vars(again).keys() == vars(original).keys()
    again = copied(Numbers(size=2))
    assert again.weight.tolist() == [0, 0]
    redescribe(again, size=3)
    assert describe(again)["init_args"] == {"size": 3}


def test_a_copy_can_be_redescribed_alone() -> None:
    original = Shelf(things=1)
    again = copy.copy(original)
    redescribe(again, things=2)
    assert describe(original)["init_args"] == {"things": 1}
    assert describe(again)["init_args"] == {"things": 2}


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    source = "from mtp_modules.core import Component\nclass Thing(Component):\n    pass\n"
    (tmp_path / "a_stranger.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_stranger", raising=False)
    return "a_stranger.Thing"


def test_a_class_that_is_not_trusted_is_refused_before_its_import(stranger: str) -> None:
    nested = {"class_path": "mtp_modules.MultiTokenLoss", "init_args": {"weights": {"class_path": stranger}}}
    for description in ({"class_path": stranger}, nested):
        with pytest.raises(
            ValueError, match=r"^build: class 'a_stranger.Thing' is not from a trusted package \(mtp_mod"
        ):
            build(description)
    assert "a_stranger" not in sys.modules
    assert type(build({"class_path": stranger}, trusted=("a_stranger",))).__name__ == "Thing"


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ({}, "build: class '' is not from a trusted package"),
        ({"class_path": "mtp_modulesx.A"}, "build: class 'mtp_modulesx.A' is not from a trusted package"),
        ({"class_path": "mtp_modules.Nothing"}, "build: there is no class 'mtp_modules.Nothing' in this version"),
        ({"class_path": "mtp_modules.nowhere.A"}, "build: there is no class 'mtp_modules.nowhere.A' in this version"),
        (
            {"class_path": "mtp_modules.core.checks.refuse"},
            "build: 'mtp_modules.core.checks.refuse' is not a component",
        ),
        (
            {"class_path": "mtp_modules.core.checks.Tensor"},
            "build: 'mtp_modules.core.checks.Tensor' is not a component",
        ),
        (
            {"class_path": "mtp_modules.LinearHeads", "init_args": {"d_model": 8, "depth": 3}},
            r"build: 'mtp_modules.LinearHeads' does not take the arguments \['d_model', 'depth'\]",
        ),
        (
            {"class_path": "mtp_modules.LinearHeads", "init_args": {"d_model": 0, "num_horizons": 3}},
            "LinearHeads: d_model must be at least 1, got 0",
        ),
    ],
)
def test_bad_descriptions(description: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        build(description)


class Wrapped(Component):
    """Something with arguments of any kind."""

    def __init__(self, *, inner: object, others: list[object] | None = None) -> None:
        self.inner, self.others = inner, others


@pytest.mark.parametrize(
    ("made", "argument"),
    [
        (lambda: Wrapped(inner=nn.Linear(2, 3)), r"inner=Linear\(in_features=2"),
        (lambda: Wrapped(inner=Wrapped(inner=1, others=[2, torch.zeros(1)])), r"others=\[2, 'tensor\(\[0\.\]\)'\]"),
        (lambda: Wrapped(inner={"how": len}), r"inner=\{'how': '<built-in function len>'\}"),
    ],
)
def test_an_argument_that_cannot_be_described_is_named(made: Callable[[], Component], argument: str) -> None:
    with pytest.raises(
        ValueError, match=f"^Here: Wrapped was made with {argument}.*, which no file can describe; give"
    ):
        check_describable("Here", copy.deepcopy(made()))
    plain = json.loads(json.dumps(describe(made())))
    assert plain == describe(made())
    assert type(describe(Wrapped(inner=nn.Identity()))["init_args"]["inner"]) is str


def test_what_can_be_described_is_accepted() -> None:
    check_describable("Here", Wrapped(inner=Path("a"), others=[torch.float32, None, {"b": Wrapped(inner=[1])}]))
    check_describable("Here", make_model("lstm", "recurrent", 2))


class OwnTrunk(RecomputedTrunk):
    """A trunk around a module that is given."""

    def __init__(self, *, module: nn.Module) -> None:
        super().__init__()
        self.module, self.embedding = module, nn.Embedding(11, 8)
        self.vocab_size, self.d_model, self.embedding_width, self.max_positions = 11, 8, 8, None

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.module(self.embedding(tokens))


def test_a_trunk_around_a_module_decodes_and_is_not_saved(tmp_path: Path) -> None:
    model = MTPModel(trunk=OwnTrunk(module=nn.Linear(8, 8)), heads=LinearHeads(d_model=8, num_horizons=2)).eval()
    assert len(SpeculativeDecoder().generate(model, [[1, 2]], max_new_tokens=4).tokens[0]) == 4
    sentence = (
        r"^MTPModel: OwnTrunk was made with module=Linear.*; give its constructor sizes and names, and let it build"
    )
    with pytest.raises(ValueError, match=sentence):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
