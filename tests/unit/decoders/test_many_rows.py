"""Rounds of many rows run as much Python as rounds of few: nothing is done row by row."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import mtp_modules
from mtp_modules import AutoregressiveDecoder, SpeculativeDecoder
from mtp_modules.decoders import (
    BeamDecoder,
    BlockVerification,
    ConfidentDepth,
    CostAwareDepth,
    Decoder,
    DraftedBeamDecoder,
    DynamicTree,
    JointBeamDecoder,
    LookupOrHeads,
    PromptLookup,
    RejectionSampling,
    SamplingParams,
    StaticTree,
    StopRule,
    TypicalAcceptance,
)
from mtp_modules.decoders.request import DecodableModel
from tests.helpers import make_model

PACKAGE = str(Path(mtp_modules.__file__).parent)
DRAWN = SamplingParams(temperature=0.8, top_k=9, repetition_penalty=1.1, allowed_tokens=range(10))
CHAINS = [
    pytest.param(AutoregressiveDecoder(), None, id="plain"),
    pytest.param(AutoregressiveDecoder(), DRAWN, id="plain-drawn"),
    pytest.param(SpeculativeDecoder(), None, id="chain"),
    pytest.param(SpeculativeDecoder(acceptance=RejectionSampling()), DRAWN, id="rejection"),
    pytest.param(SpeculativeDecoder(acceptance=BlockVerification()), DRAWN, id="block"),
    pytest.param(SpeculativeDecoder(acceptance=TypicalAcceptance()), DRAWN, id="typical"),
    pytest.param(SpeculativeDecoder(policy=ConfidentDepth(threshold=0.1)), DRAWN, id="confident"),
    pytest.param(SpeculativeDecoder(num_drafts=3, drafter=PromptLookup()), None, id="lookup"),
    pytest.param(SpeculativeDecoder(drafter=LookupOrHeads()), None, id="lookup-or-heads"),
]
TREES = [
    pytest.param(SpeculativeDecoder(tree=StaticTree(widths=[2, 1])), DRAWN, id="static-tree"),
    pytest.param(SpeculativeDecoder(tree=DynamicTree(depth=2, width=2, nodes=5)), None, id="dynamic-tree"),
]
BEAMS = [
    pytest.param(BeamDecoder(num_beams=3), id="beams"),
    pytest.param(DraftedBeamDecoder(num_beams=3), id="drafted-beams"),
    pytest.param(JointBeamDecoder(num_beams=3), id="joint-beams"),
]
MODELS = [("transformer", "parallel"), ("transformer_previous", "sequential"), ("lstm", "linear")]


def watched(call: Callable[[], Any]) -> tuple[int, Any]:
    """Return how many instructions of this package a call runs, and what it returns."""
    ran = 0

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal ran
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        ran += event == "opcode"
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        done = call()
    finally:
        sys.settrace(before)
    return ran, done


def steps_of_rounds(decoder: Decoder, params: SamplingParams | None, names: tuple[str, str], copies: int) -> list[int]:
    """Return how many instructions of this package each round after the first runs, with so many copies of 3 rows."""
    model: DecodableModel = make_model(*names, 3).eval()
    prompts = [[1, 2, 3, 1, 2], [4], [5, 6]] * copies
    asked = {
        "max_new_tokens": [11, 16, 18] * copies,
        "stop": StopRule(tokens=[10]),
        "sampling": params,
        "seed": [1, 2, 3] * copies,
    }
    stream = decoder.stream(model, prompts, **asked)
    next(stream)  # what is made once a run may well take a step a row
    steps = []
    while True:
        ran, done = watched(lambda: next(stream, None))
        if done is None:
            return steps
        steps.append(ran)


@pytest.mark.parametrize(("decoder", "params"), CHAINS)
def test_no_python_runs_for_each_row(decoder: Decoder, params: SamplingParams | None) -> None:
    few = steps_of_rounds(decoder, params, MODELS[0], 4)
    assert len(few) > 1
    assert min(few) > 100
    assert steps_of_rounds(decoder, params, MODELS[0], 16) == few


@pytest.mark.parametrize(("decoder", "params"), CHAINS[2:4])
@pytest.mark.parametrize("model", MODELS[1:], ids="-".join)
def test_nor_with_other_trunks_and_heads(
    decoder: Decoder, params: SamplingParams | None, model: tuple[str, str]
) -> None:
    few = steps_of_rounds(decoder, params, model, 4)
    assert len(few) > 1
    assert steps_of_rounds(decoder, params, model, 16) == few


@pytest.mark.parametrize(("decoder", "params"), TREES)
def test_nor_in_trees(decoder: Decoder, params: SamplingParams | None) -> None:
    few = steps_of_rounds(decoder, params, MODELS[0], 4)
    assert len(few) > 1
    assert steps_of_rounds(decoder, params, MODELS[0], 16) == few


@pytest.mark.parametrize("decoder", BEAMS)
@pytest.mark.parametrize("model", MODELS[1:], ids="-".join)
def test_nor_for_each_hypothesis(decoder: Decoder, model: tuple[str, str]) -> None:
    few = steps_of_rounds(decoder, SamplingParams(allowed_tokens=range(10)), model, 4)
    assert len(few) > 1
    assert steps_of_rounds(decoder, SamplingParams(allowed_tokens=range(10)), model, 16) == few


def test_nor_for_a_policy_to_learn() -> None:
    chooser = CostAwareDepth().start(3)
    chooser.learn(2, 3, [0, 3], [3, 3], 1.0)
    few, many = (watched(partial(chooser.learn, 2, 3, [0, 3] * copies, [3, 3] * copies, 1.0))[0] for copies in (1, 25))
    assert few == many > 100
