"""Weights over a run."""

from collections.abc import Callable

import pytest

from mtp_modules import AuxiliaryWeights, ExplicitWeights, GeometricWeights, UniformWeights
from mtp_modules.core import build, describe
from mtp_modules.losses import HeadCurriculum, LinearWeightSchedule, StepwiseWeightSchedule


def stages(*weights: float) -> list[AuxiliaryWeights]:
    return [AuxiliaryWeights(weight=weight) for weight in weights]


def test_a_linear_schedule_stays_moves_and_stays() -> None:
    schedule = LinearWeightSchedule(start=stages(0.3)[0], end=stages(0.1)[0], begin=0.25, finish=0.75)
    far = [schedule(3, progress)[2] for progress in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)]
    assert far == pytest.approx([0.3, 0.3, 0.25, 0.2, 0.1, 0.1], rel=1e-15)
    assert [schedule(3, progress)[0] for progress in (0.0, 0.4, 1.0)] == [1.0, 1.0, 1.0]


def test_a_stepwise_schedule_changes_at_its_boundaries() -> None:
    schedule = StepwiseWeightSchedule(stages=stages(0.3, 0.2, 0.1), boundaries=[0.5, 0.9])
    far = [schedule(2, progress)[1] for progress in (0.0, 0.4999, 0.5, 0.8999, 0.9, 1.0)]
    assert far == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]


@pytest.mark.parametrize(
    ("direction", "active"),
    [("forward", [1, 1, 2, 2, 3, 3, 4, 4, 4]), ("reverse", [4, 4, 3, 3, 2, 2, 1, 1, 1])],
)
def test_a_curriculum_adds_or_drops_one_head_a_phase(direction: str, active: list[int]) -> None:
    curriculum = HeadCurriculum(weights=GeometricWeights(gamma=0.5), direction=direction)
    for eighth, heads in enumerate(active):
        expected = [0.5**index if index < heads else 0.0 for index in range(4)]
        assert curriculum(4, eighth / 8) == expected


def test_a_curriculum_may_finish_early() -> None:
    curriculum = HeadCurriculum(weights=UniformWeights(), direction="forward", finish=0.5)
    assert [sum(curriculum(2, progress)) for progress in (0.0, 0.24, 0.25, 0.6, 1.0)] == [1, 1, 2, 2, 2]


def test_schedules_nest_and_describe_themselves() -> None:
    nested = StepwiseWeightSchedule(
        stages=[
            HeadCurriculum(weights=UniformWeights(), direction="forward", finish=0.5),
            LinearWeightSchedule(start=stages(1.0)[0], end=stages(0.0)[0], begin=0.5),
        ],
        boundaries=[0.5],
    )
    again = build(describe(nested))
    for progress in (0.0, 0.3, 0.5, 0.8, 1.0):
        assert again(3, progress) == nested(3, progress)
    assert nested(3, 0.75) == [1.0, 0.5, 0.5]
    assert nested.changes
    assert not UniformWeights().changes


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: LinearWeightSchedule(start=stages(1)[0], end=stages(0)[0], begin=0.5, finish=0.5),
            r"LinearWeightSchedule: finish must lie above begin \(0\.5\), got 0\.5\.",
        ),
        (
            lambda: LinearWeightSchedule(start=stages(1)[0], end=stages(0)[0], begin=-0.1),
            r"LinearWeightSchedule: begin must lie in \[0, 1\], got -0\.1\.",
        ),
        (
            lambda: StepwiseWeightSchedule(stages=stages(1, 0), boundaries=[]),
            r"StepwiseWeightSchedule: boundaries must hold one number fewer than there are stages \(2\), got 0\.",
        ),
        (
            lambda: StepwiseWeightSchedule(stages=stages(1, 0.5, 0), boundaries=[0.5, 0.5]),
            r"StepwiseWeightSchedule: boundaries must rise between 0 and 1, got \[0\.5, 0\.5\]\.",
        ),
        (
            lambda: HeadCurriculum(weights=UniformWeights(), direction="up"),
            r"HeadCurriculum: direction must be forward or reverse, got 'up'\.",
        ),
        (
            lambda: HeadCurriculum(weights=UniformWeights(), direction="forward", finish=0.0),
            r"HeadCurriculum: finish must lie in \(0, 1\], got 0\.0\.",
        ),
        (
            lambda: LinearWeightSchedule(start=ExplicitWeights(values=[1.0]), end=stages(0)[0])(2),
            r"ExplicitWeights: values holds 1 weights for 2 horizons; give one per horizon\.",
        ),
    ],
)
def test_what_is_refused(make: Callable, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make()
