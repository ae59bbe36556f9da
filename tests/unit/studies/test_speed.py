"""Numbers of drafts side by side: they count what the decoders count, and are compared with plain decoding."""

import pytest

from mtp_modules import SpeculativeDecoder
from mtp_modules.decoders import DecodingStats
from mtp_modules.studies import measure_speeds
from tests.helpers import make_model, random_tokens


def test_every_number_counts_what_its_decoder_does() -> None:
    model = make_model("gru", "recurrent", 4, seed=2)
    prompts = random_tokens(3, 5).tolist()
    speeds = measure_speeds(model, prompts, num_drafts=[0, 3, 1], new_tokens=9)
    assert [speed.num_drafts for speed in speeds] == [0, 3, 1]
    assert speeds[0].stats.tokens_per_forward == speeds[0].speed_up == 1.0
    for speed in speeds[1:]:
        counted = DecodingStats()
        for prompt in prompts:
            rounds = SpeculativeDecoder(num_drafts=speed.num_drafts).stream(model, [prompt], max_new_tokens=10)
            for done in list(rounds)[1:]:  # the first reads the prompt
                counted.count(done)
        counted.seconds = speed.stats.seconds
        assert speed.stats == counted
        assert speed.round_seconds > 0
        assert speed.stats.seconds > speed.round_seconds


def test_one_prompt_and_one_number_give_a_speed_up_of_their_times() -> None:
    plain, drafting = measure_speeds(make_model("gru", "linear", 3), [[1, 2]], num_drafts=[0, 2], new_tokens=12)
    assert plain.stats.tokens == drafting.stats.tokens == 12
    assert drafting.speed_up == pytest.approx(plain.stats.seconds / drafting.stats.seconds)


def test_what_is_refused() -> None:
    model = make_model("gru", "linear", 3)
    with pytest.raises(ValueError, match=r"^measure_speeds: num_drafts must begin with 0, plain .*; got \[1, 2\]\.$"):
        measure_speeds(model, [[1]], num_drafts=[1, 2], new_tokens=4)
    with pytest.raises(ValueError, match=r"num_drafts=9 is more than the 2 that LinearHeads can draft; lower it\.$"):
        measure_speeds(model, [[1]], num_drafts=[0, 9], new_tokens=4)
    with pytest.raises(ValueError, match=r"^measure_speeds: new_tokens must be at least 1, got 0\.$"):
        measure_speeds(model, [[1]], num_drafts=[0], new_tokens=0)
    with pytest.raises(ValueError, match=r"^measure_speeds: number of prompts must be at least 1, got 0\.$"):
        measure_speeds(model, [], num_drafts=[0], new_tokens=4)
