"""Speculative greedy decoding gives the tokens of plain decoding: exactly in float64, up to near ties below it."""

import random
from collections.abc import Sequence

import pytest
import torch

from mtp_modules import (
    AutoregressiveDecoder,
    MTPModel,
    ParallelHeads,
    RecurrentHeads,
    SpeculativeDecoder,
    TransformerTrunk,
)
from mtp_modules.decoders import DynamicTree, PromptLookup, StaticTree
from tests.drafting import ScriptedHeads
from tests.helpers import VOCAB, float64, randomise

DEPTHS = range(1, 9)


def make(heads: str, positions: int) -> MTPModel:
    """Build a model that can draft eight tokens."""
    with float64():
        trunk = TransformerTrunk(
            vocab_size=VOCAB,
            d_model=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_width=24,
            max_positions=positions,
        )
        kinds = {
            "parallel": lambda: ParallelHeads(
                d_model=16, num_horizons=9, num_heads=2, ffn_width=24, max_positions=positions
            ),
            "recurrent": lambda: RecurrentHeads(d_model=16, num_horizons=4),
        }
        model = MTPModel(trunk=trunk, heads=kinds[heads]()).eval()
    randomise(model, seed=2)
    return model.eval()


def random_prompts(count: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(VOCAB) for _ in range(numbers.randint(1, 9))] for _ in range(count)]


def mostly_right(model: MTPModel, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> MTPModel:
    """Let drafts be right three times of four, which heads that were never trained are not."""

    def script(row: int, length: int, num_drafts: int) -> list[int]:
        first = length - len(prompts[row]) + 1
        numbers = random.Random(1000 * row + first)
        right = [*outputs[row], *[0] * num_drafts][first : first + num_drafts]
        return [token if numbers.random() < 0.75 else (token + 1) % VOCAB for token in right]

    model.heads = ScriptedHeads(heads=model.heads, script=script)
    return model


def check(num_prompts: int, budget: int) -> None:
    prompts = random_prompts(num_prompts)
    for heads in ("parallel", "recurrent"):
        model = make(heads, budget + 24)
        plain = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=budget)
        assert len({tuple(row[:8]) for row in plain.tokens}) > num_prompts / 3, "the model says the same to everybody"
        decoders = [
            *(SpeculativeDecoder(num_drafts=depth) for depth in DEPTHS),
            SpeculativeDecoder(drafter=PromptLookup(num_drafts=8)),
            SpeculativeDecoder(tree=StaticTree(widths=[3, 2, 1])),
            SpeculativeDecoder(tree=DynamicTree(depth=8, nodes=16)),
        ]
        for decoder in decoders:
            assert decoder.generate(model, prompts, max_new_tokens=budget).tokens == plain.tokens
        scripted, accepted = mostly_right(model, prompts, plain.tokens), []
        for depth in DEPTHS:
            found = SpeculativeDecoder(num_drafts=depth)
            if depth > len(model.horizons) - 1:
                break
            generation = found.generate(scripted, prompts, max_new_tokens=budget)
            assert generation.tokens == plain.tokens
            accepted.append(generation.stats.tokens_per_forward)
        assert accepted == sorted(accepted)
        assert accepted[0] > 1.5


def test_five_prompts_of_sixteen_tokens_at_every_depth() -> None:
    check(num_prompts=5, budget=16)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_hundred_prompts_of_256_tokens_at_every_depth() -> None:
    check(num_prompts=100, budget=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_below_float64_outputs_part_only_at_near_ties(dtype: torch.dtype) -> None:
    """Where the outputs part, the two tokens' logits differ by no more than the precision of the forward passes."""
    model, prompts = make("recurrent", 80), random_prompts(12)
    exact = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=1)
    assert len(exact.tokens) == 12
    model = model.to(dtype)
    plain = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=40).tokens
    fast = SpeculativeDecoder(num_drafts=5).generate(model, prompts, max_new_tokens=40).tokens
    for prompt, one, other in zip(prompts, plain, fast, strict=True):
        place = next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        text = torch.tensor([[*prompt, *one[:place], *[0] * model.lookahead]])
        logits = model.unembedding.logits(model(text)[0][0, -1]).float()
        gap = (logits[one[place]] - logits[other[place]]).abs()
        assert gap <= 64 * torch.finfo(dtype).eps * logits.abs().max()
