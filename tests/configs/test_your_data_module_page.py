"""The data module on the page about data modules of one's own trains as the page says."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from mtp_modules import load_model
from mtp_modules.data import ByteTokenizer
from tests.architecture.imports import ROOT
from tests.helpers import assert_same, float64

CLOSE = 1e-7
"""AdamW divides by the gradient's size, which enlarges the rounding of small ones."""
(CODE,) = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs/your_data_module.md").read_text(encoding="utf-8"), re.M | re.S
)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page defines."""
    found: dict[str, Any] = {}
    exec(compile(CODE, "your_data_module.md", "exec"), found)
    return found


def fitted(names: dict[str, Any], folder: Path, **sizes: int) -> tuple[Trainer, Any]:
    with float64(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .*dataloader.* does not have many workers")
        found: tuple[Trainer, Any] = names["fit"](folder, **sizes)
    return found


def test_rows_learn_answers_only_and_end_where_documents_end(names: dict[str, Any]) -> None:
    rows = names["make_rows"]([("ab", "c"), ("d", "ef")], ByteTokenizer(), 5)
    assert torch.cat([row["tokens"] for row in rows]).tolist() == [*b"abc\0def\0", 0, 0]
    assert torch.cat([row["loss_mask"] for row in rows]).int().tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0]
    assert torch.cat([row["document_ids"] for row in rows]).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_accumulated_batches_take_the_step_of_one_and_the_checkpoint_has_the_tokenizer(
    names: dict[str, Any], tmp_path: Path
) -> None:
    trainer, many = fitted(names, tmp_path / "many")
    _, one = fitted(names, tmp_path / "one", batch_size=4, accumulate=1)
    assert trainer.global_step > 2
    assert_same(dict(many.model.state_dict()), dict(one.model.state_dict()), CLOSE)
    model, tokenizer = load_model(trainer.checkpoint_callback.best_model_path)
    assert isinstance(tokenizer, ByteTokenizer)
    assert_same(dict(model.state_dict()), dict(many.model.float().state_dict()), 0)
