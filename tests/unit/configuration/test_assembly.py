"""From plain values to a module and its data."""

import copy
from typing import Any

import pytest
import yaml

from mtp_modules.configuration import assemble
from tests.command_line import ROOT

NOTEBOOK = yaml.safe_load((ROOT / "configs/notebook.yaml").read_text(encoding="utf-8"))


def changed(**data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    sections = copy.deepcopy(NOTEBOOK)
    sections["data"]["init_args"].update(data)
    return sections["model"], sections["data"]


def test_sizes_are_filled_in() -> None:
    model, data = changed()
    model["trunk"]["init_args"]["vocab_size"] = 70  # the data's own default is another
    module, progressions = assemble(model, data)
    assert module.model.heads.d_model == 64
    assert (progressions.lookahead, progressions.vocab_size) == (3, 70)


def test_a_size_that_contradicts_another_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.init_args.vocab_size: is 60 here, but model.vocab_size is 50; leave"):
        assemble(*changed(vocab_size=60))


def test_an_unknown_class_is_refused_in_one_sentence() -> None:
    model, data = changed()
    model["heads"]["class_path"] = "LinaerHeads"
    with pytest.raises(ValueError, match=r"^model.heads: unknown class 'LinaerHeads'. Known: LinearHeads, Parallel"):
        assemble(model, data)
