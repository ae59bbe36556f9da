"""A checkpoint of another model or tokenizer is rejected by the name of the argument, even where all weights fit."""

import copy
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import mtp_modules
from mtp_modules import MTPModel, ParallelHeads, RecurrentTrunk, TransformerTrunk
from mtp_modules.core import Heads, Trunk
from mtp_modules.core.component import Component, describe
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.data import ByteTokenizer, WordTokenizer
from mtp_modules.pretrained import FORMAT
from mtp_modules.training.descriptions import FREE, check_same_model, differences
from tests.unit.training.running import SaveAt, data, module, trainer


def model(trunk: dict[str, Any] | None = None, heads: dict[str, Any] | None = None, **options: Any) -> MTPModel:
    sizes = {"vocab_size": 24, "d_model": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    more = {"d_model": 16, "num_horizons": 3, "num_heads": 2, "max_positions": 32}
    return MTPModel(
        trunk=TransformerTrunk(**(sizes | (trunk or {}))), heads=ParallelHeads(**(more | (heads or {}))), **options
    )


def saved(made: MTPModel, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    return {"format": FORMAT, "model": describe(made), "tokenizer": tokenizer and describe(tokenizer)}


OTHERS: dict[str, tuple[MTPModel, str]] = {
    "eps": (model({"norm_eps": 1e-5}), "model.trunk.norm_eps is 1e-06 here, but the checkpoint was trained with 1e-05"),
    "rotation base": (
        model({"rope_base": 500000.0}),
        "model.trunk.rope_base is 10000.0 here, but the checkpoint was trained with 500000.0",
    ),
    "horizons": (
        model(heads={"num_horizons": 2}),
        "model.heads.num_horizons is 3 here, but the checkpoint was trained with 2",
    ),
    "attention heads": (
        model({"num_heads": 4}),
        "model.trunk.num_heads is 2 here, but the checkpoint was trained with 4",
    ),
    "class": (
        MTPModel(
            trunk=RecurrentTrunk(vocab_size=24, d_model=16),
            heads=ParallelHeads(d_model=16, num_horizons=3, num_heads=2),
        ),
        "model.trunk is TransformerTrunk here, but the checkpoint was trained with RecurrentTrunk",
    ),
}


@pytest.mark.parametrize(("other", "sentence"), OTHERS.values(), ids=OTHERS)
def test_another_model_is_named(other: MTPModel, sentence: str) -> None:
    with pytest.raises(
        ValueError, match=f"^ckpt_path: {re.escape(sentence)}; take the checkpoint's value, or train a new model\\.$"
    ):
        check_same_model(model(), None, saved(other), "ckpt_path")


def test_what_weights_replace_may_differ() -> None:
    check_same_model(model(), None, saved(model({"embedding_std": 0.5, "max_positions": 16})), "ckpt_path")


def test_another_tokenizer_of_the_same_size() -> None:
    first, second = WordTokenizer(words=["a", "b", "c"]), WordTokenizer(words=["a", "c", "b"])
    check_same_model(model(), first, saved(model(), first), "ckpt_path")
    check_same_model(model(), None, saved(model(), first), "ckpt_path")
    check_same_model(model(), first, saved(model()), "ckpt_path")
    with pytest.raises(ValueError, match=r"^ckpt_path: data\.tokenizer\.words\[1\] is 'b' here, but the .* with 'c'; "):
        check_same_model(model(), first, saved(model(), second), "ckpt_path")
    with pytest.raises(ValueError, match=r"^init_from: data\.tokenizer is ByteTokenizer here, but .* WordTokenizer; "):
        check_same_model(model(), ByteTokenizer(), saved(model(), first), "init_from")


def test_an_argument_of_another_version() -> None:
    """An older checkpoint had the default of what it does not know; what this version does not know is rejected."""
    older, newer = saved(model()), saved(model())
    del older["model"]["init_args"]["trunk"]["init_args"]["qk_norm"]
    check_same_model(model(), None, older, "ckpt_path")
    with pytest.raises(ValueError, match=r"model\.trunk\.qk_norm is True here, but the checkpoint .* with False; "):
        check_same_model(model({"qk_norm": True}), None, older, "ckpt_path")
    newer["model"]["init_args"]["trunk"]["init_args"]["twist"] = 3
    with pytest.raises(ValueError, match=r"model\.trunk\.twist is unknown here, but the checkpoint was .* with 3; "):
        check_same_model(model(), None, newer, "ckpt_path")


def test_long_values_are_cut_where_they_differ() -> None:
    here, there = "x" * 500 + "here" + "y" * 500, "x" * 500 + "there" + "y" * 500
    (found,) = differences(here, there, "name")
    assert found.here.startswith("...xxxxxxxxxxhere")
    assert found.saved.startswith("...xxxxxxxxxxthere")
    assert max(len(found.here), len(found.saved)) < 70


def test_nothing_that_a_checkpoint_names_is_imported() -> None:
    foreign = saved(model())
    foreign["model"]["init_args"]["trunk"]["class_path"] = "antigravity.Trunk"
    with pytest.raises(ValueError, match=r"^ckpt_path: model\.trunk is TransformerTrunk here, but .* with Trunk; "):
        check_same_model(model(), None, foreign, "ckpt_path")


def _components() -> list[type[Component]]:
    """Return every concrete part of a model, and every tokenizer."""
    for found in pkgutil.walk_packages(mtp_modules.__path__, "mtp_modules."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    waiting, kinds = [Trunk, Heads, Tokenizer, MTPModel], []
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not inspect.isabstract(kind) and kind.__module__.startswith("mtp_modules."):
            kinds.append(kind)
    return sorted(kinds, key=lambda kind: kind.__name__)


COMPONENTS = _components()


def arguments(kind: type[Component]) -> list[str]:
    return [] if "__init__" not in vars(kind) else list(inspect.signature(kind.__init__).parameters)[1:]


@pytest.mark.parametrize("kind", COMPONENTS, ids=lambda kind: kind.__name__)
def test_every_argument_is_compared_or_declared_free(kind: type[Component]) -> None:
    first = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": dict.fromkeys(arguments(kind), 1)}
    for name in arguments(kind):
        second = copy.deepcopy(first)
        second["init_args"][name] = 2
        found = [difference.name for difference in differences(first, second, "part", free=FREE)]
        assert found == ([] if name in FREE else [f"part.{name}"])


def test_free_arguments_exist_and_have_reasons() -> None:
    known = {name for kind in COMPONENTS for name in arguments(kind)}
    assert FREE.keys() - known == {"dropout"}, "parts of other packages have one; those of this package have none"
    assert all(FREE.values())


def test_a_run_rejects_another_model_before_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "linear.ckpt"
    trainer(tmp_path, SaveAt(path, 1), max_steps=1, max_epochs=-1).fit(module("linear"), data())
    for stage in ("fit", "validate"):
        with pytest.raises(ValueError, match=r"^ckpt_path: model\.heads is RecurrentHeads here, but .* LinearHeads; "):
            getattr(trainer(tmp_path), stage)(module("recurrent"), data(), ckpt_path=path, weights_only=True)
