"""Laws of the learning-rate schedule."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_modules.training import WarmupDecay

SCHEDULES = st.builds(
    WarmupDecay,
    warmup_steps=st.integers(0, 20),
    decay_share=st.floats(0, 1),
    final=st.floats(0, 1),
    shape=st.sampled_from(["linear", "cosine"]),
)


@given(schedule=SCHEDULES, total=st.integers(1, 60))
def test_it_rises_stays_and_falls(schedule: WarmupDecay, total: int) -> None:
    factors = [schedule(step, total) for step in range(total + 5)]
    assert all(0 <= factor <= 1 for factor in factors)
    rise, rest = factors[: schedule.warmup_steps], factors[schedule.warmup_steps :]
    assert rise == [pytest.approx((step + 1) / schedule.warmup_steps) for step in range(len(rise))]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rest))


@given(schedule=SCHEDULES, total=st.integers(1, 60))
def test_it_ends_at_the_final_factor(schedule: WarmupDecay, total: int) -> None:
    if total > schedule.warmup_steps and schedule.decay_share * total >= 1:
        assert schedule(total, total) == pytest.approx(schedule.final)


@given(total=st.integers(10, 60), share=st.floats(0.1, 0.9))
def test_it_stays_until_the_last_share_of_the_run(total: int, share: float) -> None:
    schedule = WarmupDecay(decay_share=share)
    for step in range(total):
        assert (schedule(step, total) == 1.0) == (total - step >= share * total)


def test_cosine_falls_slowly_then_fast_then_slowly() -> None:
    schedule = WarmupDecay(shape="cosine", final=0.2)
    assert [schedule(step, 4) for step in range(5)] == pytest.approx([1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_the_default_falls_from_the_first_step_to_zero() -> None:
    assert [WarmupDecay()(step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


REFUSED = {
    "warmup": ({"warmup_steps": -1}, r"warmup_steps must be at least 0, got -1\."),
    "share": ({"decay_share": 1.5}, r"decay_share must lie in \[0, 1\], got 1\.5\."),
    "nan": ({"final": float("nan")}, r"final must lie in \[0, 1\], got nan\."),
    "shape": ({"shape": "square"}, r"shape must be linear or cosine, got 'square'\."),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_numbers_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^WarmupDecay: {sentence}$"):
        WarmupDecay(**arguments)
