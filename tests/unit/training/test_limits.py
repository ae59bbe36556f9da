"""Numbers of a trainer outside their range."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules.training.limits import check_numbers
from tests.unit.training.running import data, module, trainer

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"gradient_clip_val": -1}, "gradient_clip_val must be a finite number of at least 0, got -1."),
    ({"gradient_clip_val": math.nan}, "gradient_clip_val must be a finite number of at least 0, got nan."),
    ({"max_steps": -5}, "max_steps must be at least -1, got -5."),
    ({"max_epochs": -5}, "max_epochs must be at least -1, got -5."),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1, got 0."),
    ({"accumulate_grad_batches": 1.5}, "accumulate_grad_batches must be a whole number, got 1.5."),
    ({"limit_val_batches": -1}, "limit_val_batches must be at least 0, got -1."),
    ({"limit_train_batches": math.nan}, "limit_train_batches must be at least 0, got nan."),
    (
        {"limit_test_batches": 2.5},
        "limit_test_batches must be a share up to 1.0 or a whole number of batches, got 2.5.",
    ),
    ({"val_check_interval": 0}, "val_check_interval must be at least 1, got 0."),
    ({"val_check_interval": 1.5}, "val_check_interval must be a share in 0..1 or a whole number of batches, got 1.5."),
]
RIGHT = {"gradient_clip_val": 0.5, "max_steps": -1, "max_epochs": None, "limit_val_batches": 0, "val_check_interval": 7}


def test_numbers_outside_their_range_are_refused(tmp_path: Path) -> None:
    check_numbers(RIGHT | {"limit_train_batches": 0.5, "val_check_interval": None, "overfit_batches": 0.0})
    for options, sentence in WRONG:
        with pytest.raises(ValueError, match=f"^trainer: {re.escape(sentence)}$"):
            check_numbers(options)
    for options in ({"gradient_clip_val": -1.0}, {"accumulate_grad_batches": 0}):  # Lightning would begin to train
        with pytest.raises(ValueError, match=r"^trainer: (gradient_clip_val|accumulate_grad_batches) must be"):
            trainer(tmp_path, **options).fit(module(), data())


def test_numbers_of_an_optimizer_are_refused_before_training(tmp_path: Path) -> None:
    for options, sentence in [
        ({"lr": -0.1}, "Invalid learning rate: -0.1; see the documentation of the optimizer for its range."),
        ({"lr": math.inf}, "lr must be finite, got inf."),
        ({"lr": 0.1, "weight_decay": math.nan}, "Invalid weight_decay value: nan; see the documentation of the "),
        ({"lr": 0.1, "weight_decay": math.inf}, "weight_decay must be finite, got inf."),
    ]:
        made = module()
        made.optimizer = partial(torch.optim.AdamW, **options)
        with pytest.raises(ValueError, match=f"^model.optimizer: {re.escape(sentence)}"):
            trainer(tmp_path).fit(made, data())
