"""The figures that metrics read, by hand; and the loss itself fits a screen."""

import ast
import inspect
import textwrap

import pytest
import torch

from mtp_modules import MultiTokenLoss
from mtp_modules.core.objective import CrossEntropyTerms
from mtp_modules.losses.examples import examples_of, head_by_head
from mtp_modules.losses.figures import agreement, loss_terms

TOKENS = torch.tensor([[1, 2, 3, 4, 5]])
HORIZONS = (1, 2)
NEAR, FAR = torch.tensor([[2, 9, 4]]), torch.tensor([[[9], [5], [6]]])
"""What horizon 1 and horizon 2 find most likely at the three positions: 9 is wrong, and both say so of position 1."""


def test_a_draft_agrees_where_horizon_one_says_the_same_of_its_token() -> None:
    examples = examples_of(TOKENS, HORIZONS, None)
    agrees, comparable = agreement(NEAR, FAR, examples.valid, examples, HORIZONS)
    assert agrees[0, :2].tolist() == [[True, True], [True, False]]
    assert comparable.tolist() == [[True, True, False]]  # horizon 1 has not read far enough for the last one


def test_figures_are_those_of_each_horizon() -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    examples = examples_of(TOKENS, HORIZONS, None, loss_mask=mask)
    terms = CrossEntropyTerms(
        loss=torch.tensor(7.0),
        nll=head_by_head(torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[[2.0], [4.0], [100.0]]])),
        rank=torch.arange(6),
        predicted=head_by_head(NEAR, FAR),
    )
    found = loss_terms(terms, examples, HORIZONS, scored=examples.far_valid, dtype=torch.float32)
    assert found.loss == 7
    assert found.count.tolist() == [3, 2]
    assert found.nll.tolist() == [3, 3]
    assert found.rank.tolist() == [[[0, 3], [1, 4], [2, 5]]]
    assert found.valid.tolist() == [[[True, True], [True, True], [True, False]]]


METHODS = {name: method for name, method in vars(MultiTokenLoss).items() if inspect.isfunction(method)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_of_the_loss_fits_a_screen(method: object) -> None:
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method)))).body
    first = function.body[ast.get_docstring(function) is not None]
    assert function.end_lineno - first.lineno + 1 <= 45
