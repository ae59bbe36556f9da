"""Prompts are read in the pieces that there are graphs for."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.decoders import PromptLookup, SamplingParams, compile_for_decoding
from mtp_modules.decoders.graphs.executor import GraphModel
from mtp_modules.decoders.graphs.prompts import in_one_tensor, logits_behind
from tests.helpers import make_model

SIZES = st.lists(st.integers(1, 40), max_size=4)


def with_sizes(sizes: list[int]) -> GraphModel:
    return compile_for_decoding(make_model("transformer", "linear", 3), prompt_sizes=sizes, backend="eager")


@given(sizes=SIZES, length=st.integers(1, 300))
def test_pieces_are_of_the_sizes_and_waste_less_than_half_of_the_last(sizes: list[int], length: int) -> None:
    pieces = with_sizes(sizes).prompt_pieces(length)
    assert set(pieces) <= set(sizes)
    assert sum(pieces[:-1]) < length
    over = sum(pieces) - length
    if over > 0:
        assert over < pieces[-1] / 2
        assert not any(pieces[-1] - over <= size < pieces[-1] for size in sizes)
    else:
        rest = -over
        assert not any(size <= rest or rest <= size < 2 * rest for size in sizes)
        assert rest not in sizes
    assert all(earlier >= later for earlier, later in itertools.pairwise(pieces[:-1]))


def test_the_pieces_of_the_docstring() -> None:
    assert with_sizes([16, 64]).prompt_pieces(100) == [64, 64]
    assert with_sizes([16, 64]).prompt_pieces(20) == [16]
    assert with_sizes([]).prompt_pieces(20) == []


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), sizes=st.lists(st.integers(0, 5), max_size=4))
def test_logits_are_those_of_the_last_token_of_each_row(lengths: list[int], sizes: list[int]) -> None:
    prompts = [[10 * row + place + 1 for place in range(length)] for row, length in enumerate(lengths)]
    sizes = [*sizes, max(0, max(lengths) - sum(sizes))]
    kept: list[list[int]] = [[] for _ in prompts]

    def read(piece: torch.Tensor, last: torch.Tensor, keep: list[int]) -> torch.Tensor:
        for row, count in enumerate(keep):
            kept[row] += piece[row, :count].tolist()
        return piece.gather(1, last[:, None])[:, :, None].double()

    chunk = in_one_tensor(prompts, sum(sizes), torch.device("cpu"))
    assert logits_behind(chunk, lengths, sizes, read).flatten().tolist() == [prompt[-1] for prompt in prompts]
    assert kept == prompts


@pytest.mark.parametrize("heads", ["recurrent", "parallel", "sequential"])
@pytest.mark.parametrize(
    "prompts", [[[1, 2, 3]], [[1, 2, 3, 4, 5] * 3], [[5, 6] * 7, [7]], [[5], [6, 7] * 7], [[1] * 47]]
)
def test_compiled_prompts_leave_the_same_behind(heads: str, prompts: list[list[int]]) -> None:
    """Also where a piece reaches beyond the last position, which is 48."""
    model = make_model("transformer_previous", heads, 3).eval()
    fast = compile_for_decoding(model, batch_sizes=(1, 2), prompt_sizes=(4, 10), backend="eager")
    read = fast._prompt
    sizes: list[int] = []

    def noted(*inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(inputs[2].shape[1])
        return read(*inputs)

    fast._prompt = noted
    budget = min(9, 48 - max(map(len, prompts)))
    for decoder, law in (
        (AutoregressiveDecoder(), SamplingParams(temperature=0.0)),
        (SpeculativeDecoder(), SamplingParams(temperature=0.8, repetition_penalty=1.3)),
        (SpeculativeDecoder(drafter=PromptLookup()), SamplingParams(temperature=0.0)),
    ):
        asked = {"max_new_tokens": budget, "sampling": law, "seed": 3}
        wanted = decoder.generate(model, prompts, **asked).tokens
        sizes.clear()
        for _ in range(2):
            assert decoder.generate(fast, prompts, **asked).tokens == wanted
        assert sizes == fast.prompt_pieces(max(map(len, prompts))) * 2
    first, same = (
        next(iter(SpeculativeDecoder(return_distributions=True).stream(used, prompts, max_new_tokens=1)))
        for used in (fast, model)
    )
    assert first.distributions is not None
    assert same.distributions is not None
    torch.testing.assert_close(first.distributions.target_probs, same.distributions.target_probs)


def test_prompts_of_a_batch_without_graphs_go_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("transformer", "linear", 3).eval()
    fast = compile_for_decoding(model, batch_sizes=(1,), prompt_sizes=(2,), backend="eager")
    monkeypatch.setattr(fast, "read_prompt", None)
    asked = {"max_new_tokens": 3}
    wanted = AutoregressiveDecoder().generate(model, [[1, 2], [3, 4]], **asked).tokens
    assert AutoregressiveDecoder().generate(fast, [[1, 2], [3, 4]], **asked).tokens == wanted
    with pytest.raises(TypeError):
        AutoregressiveDecoder().generate(fast, [[1, 2]], **asked)
