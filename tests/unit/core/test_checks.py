"""One sentence for each kind of bad input."""

import re

import pytest
import torch

from mtp_modules.core import checks


def test_refuse_names_the_object_or_the_class() -> None:
    with pytest.raises(ValueError, match=r"^Who: what must be so\.$"):
        checks.refuse("Who", "what must be so.")
    with pytest.raises(ValueError, match=r"^Linear: what must be so\.$"):
        checks.refuse(torch.nn.Linear(1, 1), "what must be so.")


@pytest.mark.parametrize("value", [0, -3, 0.999, float("nan"), float("-inf")])
def test_at_least_refuses(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^Who: width must be at least 1, got {value}\.$"):
        checks.at_least("Who", "width", value, 1)


@pytest.mark.parametrize("value", [1, 2, 1.5])
def test_at_least_passes(value: float) -> None:
    checks.at_least("Who", "width", value, 1)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_fraction_refuses(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^Who: share must lie in \[0, 1\], got {value}\.$"):
        checks.fraction("Who", "share", value)


def test_fraction_knows_its_limits() -> None:
    for value in (0.0, 0.5, 1.0):
        checks.fraction("Who", "share", value)
    with pytest.raises(ValueError, match=r"^Who: share must lie in \(0, 1\], got 0\.0\.$"):
        checks.fraction("Who", "share", 0.0, zero=False)


def test_divides() -> None:
    checks.divides("Who", "num_heads", 4, "d_model", 8)
    with pytest.raises(ValueError, match=r"^Who: d_model \(9\) must be a multiple of num_heads \(4\)\.$"):
        checks.divides("Who", "num_heads", 4, "d_model", 9)


@pytest.mark.parametrize(("tokens", "wrong"), [([[0, 11]], 11), ([[3, -1]], -1), ([[-5, 99]], -5)])
def test_tokens_outside_the_vocabulary(tokens: list, wrong: int) -> None:
    sentence = f"Who: token {wrong} is outside the vocabulary 0..10; encode the text with the tokenizer that the model"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        checks.tokens_in_vocabulary("Who", torch.tensor(tokens), 11)


def test_tokens_inside_the_vocabulary() -> None:
    checks.tokens_in_vocabulary("Who", torch.tensor([[0, 10]]), 11)
    checks.tokens_in_vocabulary("Who", torch.empty(2, 0, dtype=torch.long), 11)
