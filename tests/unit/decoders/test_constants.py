"""Compiled graphs keep a weight once, however many products it goes into."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mtp_modules.decoders.graphs.inductor import SharedConstants, inductor_options


def test_what_is_the_same_to_the_bit_is_one_constant() -> None:
    shared, first = SharedConstants(), torch.tensor([0.0, 1.0])
    assert shared.known(first) is first
    assert shared.known(first.clone()) is first
    for other in (
        torch.tensor([-0.0, 1.0]),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([0.0, 2.0]),
        torch.tensor(0.0),
        torch.tensor([0.0, 1.0]).to_sparse(),
        torch.zeros(2, 2).t()[0],
    ):
        assert shared.known(other) is other
    other = shared.known(torch.tensor([torch.nan, 1.0]))
    assert shared.known(other.clone()) is other


def test_what_no_graph_has_any_more_is_not_kept() -> None:
    shared, freed = SharedConstants(), []
    made = torch.ones(3)
    weakref.finalize(shared.known(made), freed.append, True)
    del made
    gc.collect()
    assert freed
    again = torch.ones(3)
    assert shared.known(again) is again


class _Noting(SharedConstants):
    """Notes how often it was asked and what it has said."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.said = 0, set()

    def known(self, constant: torch.Tensor) -> torch.Tensor:
        found = super().known(constant)
        if constant.shape.numel() == 48 * 64:
            self.asked += 1
            self.said.add(found.data_ptr())
        return found


class _Steps(nn.Module):
    """The same step, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(48, 64, bias=False), nn.Linear(64, 48, bias=False)

    def forward(self, state: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            state = self.back(self.there(state).tanh())
        return state


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of inductor about itself
def test_a_weight_is_laid_out_once_for_all_products_of_all_graphs() -> None:
    steps, shared = _Steps().eval(), _Noting()
    options = inductor_options(torch.device("cpu"), freeze=True)
    graphs = torch.compile(steps, options=options, fullgraph=True, dynamic=False)
    state = torch.randn(1, 48)
    with torch.inference_mode(), torch._dynamo.config.patch(prepare_freezing=True), shared.used():
        for count in (2, 3):
            torch.testing.assert_close(graphs(state, count), steps(state, count))
    assert shared.asked >= 2 * (2 + 3), shared.asked
    assert len(shared.said) <= 4, shared.said  # each as it is, and laid out anew
