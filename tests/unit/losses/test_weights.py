"""Weights of horizons."""

from collections.abc import Callable

import pytest

from mtp_modules import AuxiliaryWeights, ExplicitWeights, GeometricWeights, MultiTokenLoss, UniformWeights
from mtp_modules.core.objective import HorizonWeights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (UniformWeights(), [1.0, 1.0, 1.0]),
        (UniformWeights(preserve_total=True), [1 / 3, 1 / 3, 1 / 3]),
        (GeometricWeights(gamma=2.0), [1.0, 2.0, 4.0]),
        (GeometricWeights(gamma=0.0), [1.0, 0.0, 0.0]),
        (GeometricWeights(gamma=2.0, preserve_total=True), [1 / 7, 2 / 7, 4 / 7]),
        (AuxiliaryWeights(weight=0.1), [1.0, 0.1, 0.1]),
        (AuxiliaryWeights(weight=0.0), [1.0, 0.0, 0.0]),
        (ExplicitWeights(values=[0.0, 3.0, 1.0]), [0.0, 3.0, 1.0]),
    ],
)
def test_three_horizons(weights: HorizonWeights, expected: list[float]) -> None:
    assert weights(3) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: GeometricWeights(gamma=-1.0),
            r"GeometricWeights: gamma must be a finite number of at least 0, got -1\.0\.",
        ),
        (
            lambda: GeometricWeights(gamma=float("nan")),
            r"GeometricWeights: gamma must be a finite number of at least 0, got nan\.",
        ),
        (
            lambda: AuxiliaryWeights(weight=-0.5),
            r"AuxiliaryWeights: weight must be a finite number of at least 0, got -0\.5\.",
        ),
        (
            lambda: ExplicitWeights(values=[1.0, -1.0]),
            r"ExplicitWeights: values\[1] must be a finite number of at least 0, got -1\.0\.",
        ),
        (
            lambda: ExplicitWeights(values=[float("inf")]),
            r"ExplicitWeights: values\[0] must be a finite number of at least 0, got inf\.",
        ),
        (
            lambda: ExplicitWeights(values=[0.0, 0]),
            r"ExplicitWeights: values must hold a weight above 0, got \[0\.0, 0\]\.",
        ),
        (lambda: ExplicitWeights(values=[]), r"ExplicitWeights: values must hold a weight above 0, got \[\]\."),
        (
            lambda: ExplicitWeights(values=[1.0, 0.5])(3),
            r"ExplicitWeights: values holds 2 weights for 3 horizons; give one per horizon\.",
        ),
        (
            lambda: MultiTokenLoss(share_of_positions=0.0),
            r"MultiTokenLoss: share_of_positions must lie in \(0, 1\], got 0\.0\.",
        ),
        (lambda: MultiTokenLoss(distillation=1.5), r"MultiTokenLoss: distillation must lie in \[0, 1\], got 1\.5\."),
        (
            lambda: AuxiliaryWeights(weight=1.0, decay=0),
            r"AuxiliaryWeights: decay must be a finite number above 0, got 0\.",
        ),
        (
            lambda: MultiTokenLoss(distillation=1.0, log_acceptance=True),
            "MultiTokenLoss: log_acceptance measures the share that total_variation gives, which is 0; set it above 0.",
        ),
        (
            lambda: MultiTokenLoss(distillation=1.0, total_variation=1.0, log_acceptance=True, lk_eta=3.0),
            "MultiTokenLoss: lk_eta needs total_variation above 0 and no log_acceptance; set them so, or leave it out.",
        ),
        (
            lambda: MultiTokenLoss(distillation=1.0, lk_eta=3.0),
            "MultiTokenLoss: lk_eta needs total_variation above 0 and no log_acceptance; set them so, or leave it out.",
        ),
        (lambda: MultiTokenLoss(total_variation=-1), r"MultiTokenLoss: total_variation must lie in \[0, 1\], got -1\."),
        (
            lambda: MultiTokenLoss(label_smoothing=-0.1),
            r"MultiTokenLoss: label_smoothing must lie in \[0, 1\], got -0\.1\.",
        ),
        (lambda: MultiTokenLoss(z_loss=-1.0), r"MultiTokenLoss: z_loss must be at least 0, got -1\.0\."),
    ],
)
def test_what_is_refused(make: Callable, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make()


def test_weights_may_decay_within_less_than_a_horizon() -> None:
    assert AuxiliaryWeights(weight=0.5, decay=1e-320)(3) == [1.0, 0.5, 0.0]
