"""What is recorded computes again what the function computes, on other numbers in the same tensors."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mtp_modules.decoders import tape
from mtp_modules.decoders.tape import record

CPU = torch.device("cpu")
WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def _constant_that_is_written(x: Tensor) -> Tensor:
    kept = torch.zeros(3, 4)
    kept.masked_fill_(x > 0, 1.0)
    return kept + torch.eye(3, 4) * torch.arange(4)


def _view_that_is_written(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1].add_(10)
    y.view(-1).index_copy_(0, torch.arange(2, 4), x[0, :2])
    return y.t().reshape(2, 6)


def _constant_view_that_is_written(x: Tensor) -> Tensor:
    kept = torch.ones(2, 3, 4)
    first = kept[0]
    first.add_(x)
    return kept.sum(dim=0)


def _input_that_is_written(x: Tensor) -> Tensor:
    before = x.clone()
    x.mul_(0.5)
    return before - x


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "products": lambda x: F.linear(x[None], WEIGHT) @ WEIGHT,
    "several kernels of one operator": lambda x: F.rms_norm(x, (4,), WEIGHT[0]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "rolls": lambda x: x.roll(1, dims=-1) + x.roll(-1, dims=0) + x.roll(2) + x.roll((1, 2), (0, 1)),
    "views of one another": lambda x: x.reshape(3, 2, 2).transpose(0, 1).flatten(1).narrow(1, 1, 3).contiguous(),
    "several results": lambda x: torch.cat((x.topk(2, dim=1).values, x.sort(dim=1).values), dim=1),
    "numbers and masks": lambda x: torch.where(x > 0, x, -1.0).masked_fill(x > 1, torch.inf).argmax(dim=1).double(),
    "another type": lambda x: x.double().to(torch.bfloat16).float().long() + torch.zeros_like(x),
    "by index": lambda x: WEIGHT[(x > 0).long()[:, 0]] + WEIGHT.index_select(0, (x[:, 0] > 0).long()),
    "not a number": lambda x: (x.sign() - 1).log() * 0,
    "constant that is written": _constant_that_is_written,
    "view that is written": _view_that_is_written,
    "constant view that is written": _constant_view_that_is_written,
    "input that is written": _input_that_is_written,
    "nothing but constants": lambda _: torch.arange(5).flip(0) * 2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("shares", [True, False])
def test_a_recording_computes_what_the_function_computes(name: str, inference: bool, shares: bool) -> None:
    function = FUNCTIONS[name]
    numbers = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.inference_mode(inference), torch.no_grad():
        x = numbers[0].clone()
        result, recording = record(lambda: function(x), CPU)
        place = result.data_ptr()
        if shares:
            recording.share_memory([result])
        for again in (numbers[0], *numbers[1:], numbers[1]):
            x.copy_(again)
            mine = again.clone()
            wanted = function(mine)
            if again is not numbers[0]:
                recording.replay()
                assert result.data_ptr() == place
                torch.testing.assert_close(x, mine, rtol=0, atol=0)
            else:
                x.copy_(again)
                recording.replay()
            torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


def test_random_numbers_are_drawn_anew() -> None:
    result, recording = record(lambda: torch.rand(100), CPU)
    before = result.clone()
    recording.replay()
    assert not torch.equal(result, before)


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "aten::_local_scalar_dense": lambda x: x.sum().item(),
    "aten::_local_scalar_dense ": lambda x: bool((x > 0).any()),
    "aten::index": lambda x: x[x > 0],
    "Tensor.tolist": lambda x: x.tolist(),
    "Tensor.numpy": lambda x: x.numpy(),
    "aten::nonzero": lambda x: x.nonzero(),
    "aten::lift_fresh": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "aten::index_put_": lambda x: x.clone().index_put_((x > 0,), torch.ones(())),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_on_the_host_are_refused(name: str) -> None:
    x = torch.ones(3, 4)
    with pytest.raises(
        ValueError,
        match=rf"^record_for_decoding: a round calls {name.strip()}, which takes numbers to the host or from it",
    ):
        record(lambda: REFUSED[name](x), CPU)


@torch.inference_mode()
def test_looking_at_memory_and_constants_take_no_call() -> None:
    with tape._Tape() as found:
        x = torch.ones(3, 4)
        y = x.t().reshape(2, 6)[:, 1:]
        torch.eye(3) + torch.arange(3)
        y.unsqueeze(0).expand(2, -1, -1)
    assert len(kernels_of(found)) == 0
    with tape._Tape() as found:
        F.linear(WEIGHT[None], WEIGHT)  # views and one product
        F.rms_norm(WEIGHT, (4,))  # six kernels
    assert len(kernels_of(found)) == 2


@torch.inference_mode()
def test_what_is_not_needed_any_more_gives_its_memory_away() -> None:
    x = torch.randn(50)

    def long_chain() -> tuple[Tensor, Tensor]:
        y = first = x + 1
        for _ in range(20):
            y = (y * 2).view(5, 10).t().sin().flatten()
        return y, first

    (result, first), recording = record(long_chain, CPU)
    wanted = result.clone()
    recording.share_memory([result, first])
    places = {tensor.data_ptr() for call in recording._calls for tensor in call.made}
    assert len(recording._calls) > 40
    assert len(places) <= 5
    for number in (7.0, None):
        before = x.clone()
        if number is not None:
            x.fill_(number)
        recording.replay()
        again = long_chain()
        assert torch.equal(result, again[0])
        assert torch.equal(first, again[1])
        x.copy_(before)
    recording.replay()
    assert torch.equal(result, wanted)


def kernels_of(found: tape._Tape) -> list[Callable[[], object]]:
    return [call.kernel for call in found.calls if not call.constant]


class _FakeGraph:
    """What a CUDA graph does, on a processor: what it captures is not computed before it is replayed."""

    def __init__(self) -> None:
        self.kernels: list[Callable[[], object]] = []

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel()


def test_a_cuda_graph_is_captured_behind_a_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that is made of the tape: that the calls are made in this order, not that a GPU likes them."""
    calls: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            calls.append("wait")

    @contextmanager
    def stream(_: object) -> object:
        calls.append("ahead")
        yield

    @contextmanager
    def graph(made: _FakeGraph, stream: Stream) -> object:
        calls.append("capture")
        with tape._Tape() as found:
            yield
        made.kernels = kernels_of(found)

    for name, fake in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", stream),
        ("CUDAGraph", _FakeGraph),
        ("graph", graph),
        ("device", nullcontext),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    watch = tape._Watch
    monkeypatch.setattr(tape, "_Watch", lambda _: watch(CPU))
    x = torch.ones(2)

    def function() -> Tensor:
        calls.append("call")
        return x + 1

    result, recording = record(function, torch.device("cuda"))
    assert calls == ["wait", "ahead", "call", "wait", "capture", "call"]
    x.fill_(5)
    recording.replay()
    assert result.tolist() == [6, 6]
    with pytest.raises(ValueError, match=r"a round calls aten::_local_scalar_dense, which takes numbers to the host"):
        record(lambda: x * x.sum().item(), torch.device("cuda"))
    with pytest.raises(ValueError, match=r"a round calls Tensor.tolist, which takes numbers to the host"):
        record(lambda: x * len(x.tolist()), torch.device("cuda"))
    monkeypatch.setattr(tape, "_Watch", lambda _: watch(torch.device("meta")))
    with pytest.raises(ValueError, match=r"a round calls aten::add on another device, which takes numbers"):
        record(lambda: x + 1, torch.device("cuda"))
