"""From plain values to a module and its data."""

import copy
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule

from mtp_modules.configuration import assemble, assemble_data
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
    with pytest.raises(
        ValueError, match=r"^model.heads: unknown class 'LinaerHeads'; did you mean LinearHeads\? Known: Block"
    ):
        assemble(model, data)


@pytest.mark.parametrize("given", [{}, {"lookahead": 4}, {"vocab_size": 50}], ids=["nothing", "the same", "a default"])
def test_data_for_a_model_that_is_there(given: dict[str, Any]) -> None:
    section = {"class_path": "ProgressionDataModule", "init_args": {"batch_size": 3, **given}}
    made = assemble_data(section, lookahead=4, vocab_size=70)
    assert (made.lookahead, made.vocab_size, made.batch_size) == (4, 70, 3)
    assert "vocab_size" not in section["init_args"] or given


def test_data_without_a_vocabulary_of_its_own_gets_none() -> None:
    task = {"class_path": "PolynomialTask"}
    section = {"class_path": "TaskDataModule", "init_args": {"batch_size": 3, "task": task}}
    assert assemble_data(section, lookahead=2, vocab_size=99).lookahead == 2
    with pytest.raises(ValueError, match=r"^model.trunk.vocab_size: is 5, but the data has \d+ token ids; make it at"):
        assemble_data(section, lookahead=2, vocab_size=5)


class UntypedData(LightningDataModule):
    """As users write them."""

    def __init__(self, rows=3, lookahead=1):  # type: ignore[no-untyped-def]
        super().__init__()
        self.rows, self.lookahead = rows, lookahead


def test_data_without_types_is_made() -> None:
    section = {"class_path": f"{__name__}.UntypedData", "init_args": {"rows": 9}}
    made = assemble_data(section, lookahead=4, vocab_size=70)
    assert isinstance(made, UntypedData)
    assert (made.rows, made.lookahead) == (9, 4)


DATA_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"lookahead": 5}, r"data.init_args.lookahead: is 5 here, but model.lookahead is 4; leave it out"),
    "unknown": ({"bach_size": 5}, r"data: ProgressionDataModule has no argument 'bach_size'. Known: batch_size, "),
    "missing": ({"batch_size": None}, r"data: ProgressionDataModule needs batch_size; give it in init_args\.$"),
    "refused": ({"num_train": 0}, r"ProgressionDataModule: num_train must be at least 1, got 0\."),
}


@pytest.mark.parametrize(("given", "sentence"), DATA_REFUSED.values(), ids=DATA_REFUSED)
def test_data_that_is_refused(given: dict[str, Any], sentence: str) -> None:
    section = {"class_path": "ProgressionDataModule", "init_args": {"batch_size": 3, **given}}
    with pytest.raises(ValueError, match=f"^{sentence}"):
        assemble_data(section, lookahead=4, vocab_size=50)
