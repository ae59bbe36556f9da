"""Prompts are read in the chunks that there are graphs for."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mtp_modules import AutoregressiveDecoder
from mtp_modules.decoders import compile_for_decoding
from mtp_modules.decoders.graphs.compiled import CompiledModel
from mtp_modules.decoders.graphs.eager import EagerExecutor
from mtp_modules.decoders.graphs.executor import States
from tests.helpers import make_model

SIZES = st.lists(st.integers(1, 40), max_size=4)


def with_sizes(sizes: list[int]) -> CompiledModel:
    return compile_for_decoding(make_model("transformer", "linear", 3), prompt_sizes=sizes, backend="eager")


@given(sizes=SIZES, length=st.integers(1, 300))
def test_chunks_are_of_the_sizes_and_waste_less_than_half_of_the_last(sizes: list[int], length: int) -> None:
    *chunks, last = with_sizes(sizes).prompt_chunks(length, 1)
    assert set(chunks) <= set(sizes)
    assert sum(chunks) < length <= sum(chunks) + last
    over = sum(chunks) + last - length
    if last in sizes:
        assert over < last / 2
        assert not any(last - over <= size < last for size in sizes)
    else:  # what is left for the model as it is
        assert over == 0
        assert not any(size <= last or last <= size < 2 * last for size in sizes)
    assert all(earlier >= later for earlier, later in itertools.pairwise(chunks))


def test_the_chunks_of_the_docstring() -> None:
    assert with_sizes([16, 64]).prompt_chunks(100, 1) == [64, 64]
    assert with_sizes([16, 64]).prompt_chunks(20, 1) == [16, 4]
    assert with_sizes([]).prompt_chunks(20, 1) == [20]
    assert with_sizes([16, 64]).prompt_chunks(20, 2) == [20]  # there are no graphs for two rows


class Chunked(EagerExecutor):
    """Reads prompts in chunks of given sizes; the logits after a token are the token itself."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(make_model("transformer", "linear", 3))
        self.sizes = sizes

    def prompt_chunks(self, longest: int, rows: int) -> list[int]:
        return self.sizes

    def read_prompt(self, chunk: torch.Tensor, last: torch.Tensor, states: States) -> torch.Tensor:
        assert isinstance(states, Kept)
        states.chunk = chunk
        return chunk.gather(1, last[:, None])[:, :, None].double()


class Kept(States):
    """What is kept of each chunk."""

    def __init__(self, rows: int) -> None:
        self.chunk, self.kept = torch.empty(0), [list[int]() for _ in range(rows)]

    def commit(self, keep: list[int], path: torch.Tensor | None = None) -> None:
        for row, count in enumerate(keep):
            self.kept[row] += self.chunk[row, :count].tolist()


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), sizes=st.lists(st.integers(1, 5), max_size=4))
def test_logits_are_those_of_the_last_token_of_each_row(lengths: list[int], sizes: list[int]) -> None:
    prompts = [[10 * row + place + 1 for place in range(length)] for row, length in enumerate(lengths)]
    rest, states = max(lengths) - sum(sizes), Kept(len(prompts))
    logits = Chunked([*sizes, rest] if rest > 0 else sizes).read_prompts(prompts, states)
    assert logits.flatten().tolist() == [prompt[-1] for prompt in prompts]
    assert states.kept == prompts


def test_prompts_of_a_batch_without_graphs_go_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("transformer", "linear", 3)
    fast = compile_for_decoding(model, batch_sizes=(1,), prompt_sizes=(2,), backend="eager")
    monkeypatch.setattr(fast, "_prompt", None)
    wanted = AutoregressiveDecoder().generate(model, [[1, 2], [3, 4]], max_new_tokens=3).tokens
    assert AutoregressiveDecoder().generate(fast, [[1, 2], [3, 4]], max_new_tokens=3).tokens == wanted
    with pytest.raises(TypeError):
        AutoregressiveDecoder().generate(fast, [[1, 2]], max_new_tokens=3)
