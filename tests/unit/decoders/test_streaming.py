"""A stream's rounds: where each token was drafted, and that leaving early leaves nothing behind."""

import pytest
import torch

from mtp_modules import SpeculativeDecoder
from mtp_modules.decoders import Decoder, DynamicTree, StaticTree, StopRule
from tests.drafting import clock, round_of

DECODERS = [
    pytest.param(SpeculativeDecoder(), id="chain"),
    pytest.param(SpeculativeDecoder(tree=StaticTree(widths=[2, 1, 1])), id="static tree"),
    pytest.param(SpeculativeDecoder(tree=DynamicTree(depth=3, width=2, nodes=20)), id="dynamic tree"),
]


def test_depths_count_from_one_and_end_with_the_model_s_own() -> None:
    done = round_of(
        rows=[0, 1, 2],
        tokens=[[5, 6, 7], [8], [9, 9]],
        accepted=[2, 0, 2],
        drafted=[3, 3, 3],
        finish_reasons=[None, None, "stop"],
    )
    assert done.depths == [[1, 2, 0], [0], [1, 2]]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_round_tells_the_depth_of_every_token(decoder: Decoder) -> None:
    rounds = list(decoder.stream(clock(4), [[0], [4]], max_new_tokens=13))
    assert [done.depths for done in rounds] == [[[0]] * 2, *[[[1, 2, 3, 0]] * 2] * 3]
    assert [done.drafted for done in rounds] == [[0, 0], *[[3, 3]] * 3]


@pytest.mark.parametrize("hands", [(1, 2, 5, 4), (1, 3, 4, 5)], ids=str)
def test_drafts_behind_a_wrong_one_have_no_depth(hands: tuple[int, ...]) -> None:
    right = next(depth for depth, hand in enumerate(hands) if hand != depth + 1) - 1
    rounds = list(SpeculativeDecoder().stream(clock(4, hands=hands), [[0], [4]], max_new_tokens=13))
    assert [done.depths for done in rounds] == [[[0]] * 2, *[[[*range(1, right + 1), 0]] * 2] * (12 // (right + 1))]
    left = [12 - (right + 1) * index for index in range(len(rounds) - 1)]
    assert [done.drafted for done in rounds[1:]] == [[min(3, budget - 1)] * 2 for budget in left]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stop_inside_a_block_cuts_the_depths_too(decoder: Decoder) -> None:
    rounds = list(decoder.stream(clock(4), [[0], [4]], max_new_tokens=20, stop=StopRule(tokens=[3])))
    assert [done.depths for done in rounds][:2] == [[[0], [0]], [[1, 2], [1, 2, 3, 0]]]
    assert rounds[1].finish_reasons == ["stop", None]
    assert rounds[1].accepted == [2, 3]
    assert rounds[2].rows == [1]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_nothing_runs_after_a_stream_is_cancelled(decoder: Decoder, after: int) -> None:
    model, passes = clock(4), []
    model.trunk.register_forward_pre_hook(lambda *_: passes.append(torch.is_inference_mode_enabled()))
    stream = decoder.stream(model, [[0], [4]], max_new_tokens=99)
    for _ in range(after):
        next(stream)
    assert passes == [True] * after  # one pass a round, and none ahead of what was asked for
    stream.close()
    assert next(stream, None) is None
    assert len(passes) == after
    assert not torch.is_inference_mode_enabled()
