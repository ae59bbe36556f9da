"""The heads on the page about new kinds of heads pass what all heads pass, without being listed anywhere."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mtp_modules.heads
from mtp_modules.core import Heads
from tests import helpers
from tests.architecture.imports import ROOT
from tests.properties import test_causality, test_decoding, test_sampling, test_states, test_trees
from tests.unit import test_saved_models

FILE, TRIED = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs/add_heads.md").read_text(encoding="utf-8"), re.M | re.S
)
NAME = "mtp_modules.heads.step"


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Heads]]:
    """Import the class of the page from the file that the page says, with shapes checked at run time."""
    (tmp_path / "step.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(mtp_modules.heads, "__path__", [*mtp_modules.heads.__path__, str(tmp_path)])
    found: type[Heads] = importlib.import_module(NAME).StepHeads
    yield found
    del sys.modules[NAME], mtp_modules.heads.step
    found.__module__ = __name__  # a class lives on, but is no longer one of the package's


def test_the_example_trains_drafts_and_comes_back(kind: type[Heads]) -> None:
    exec(compile(TRIED, "add_heads.md", "exec"), {})  # the page asserts what must be equal


def test_it_is_the_equation_that_its_docstring_has(kind: type[Heads]) -> None:
    heads, hidden, future = kind(d_model=4, num_horizons=3, embedding_width=2), torch.randn(5, 4), torch.randn(5, 2, 2)
    first, *others = heads(hidden[None], future=future[None])
    assert torch.equal(first[0], hidden)
    for t, walked in enumerate(hidden):
        for index, linear in enumerate(heads.maps):
            walked = walked + linear.weight @ torch.cat((walked, future[t, index]))
            torch.testing.assert_close(others[index][0, t], walked)
    assert kind(d_model=4, num_horizons=1)(hidden[None])[0].shape == (1, 5, 4)


def test_its_errors(kind: type[Heads]) -> None:
    for name in ("d_model", "num_horizons", "embedding_width"):
        sizes = {"d_model": 4, "num_horizons": 2} | {name: 0}
        with pytest.raises(ValueError, match=rf"^StepHeads: {name} must be at least 1, got 0\.$"):
            kind(**sizes)
    with pytest.raises(ValueError, match=r"^StepHeads: future is missing; pass the embeddings of the next tokens"):
        kind(d_model=4, num_horizons=2)(torch.zeros(1, 3, 4))


def test_it_passes_the_tests_of_every_kind_of_heads(
    kind: type[Heads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = helpers.of_usual_sizes([kind], helpers.EVERY_HEADS.values())
    assert list(made) == ["StepHeads"]
    monkeypatch.setitem(helpers.EVERY_HEADS, "StepHeads", made["StepHeads"])
    for trunk in helpers.TWO_TRUNKS:
        test_states.test_repeated_rounds_equal_training(trunk, "StepHeads")
        test_decoding.test_speculative_decoding_equals_plain_decoding(trunk, "StepHeads")
        test_sampling.test_exact_match_gives_the_sample_of_plain_decoding(trunk, "StepHeads")
        test_causality.test_changing_a_token_changes_exactly_what_may_read_it(trunk, "StepHeads", documents=True)
    test_states.test_a_tree_is_read_as_each_of_its_paths_would_be("transformer", "StepHeads")
    test_trees.test_a_tree_s_drafts_are_those_of_the_chains_along_it("StepHeads")
    test_saved_models.test_a_folder_without_some_of_the_weights_is_refused("StepHeads", tmp_path)


def test_exported_kinds_that_are_listed_are_not_built_twice() -> None:
    exported = [getattr(mtp_modules.heads, name) for name in mtp_modules.heads.__all__]
    assert helpers.of_usual_sizes(exported, helpers.EVERY_HEADS.values()) == {}
