"""Parts of a model that learn at rates of their own."""

from functools import partial
from pathlib import Path

import pytest
import torch

from mtp_modules import LinearHeads, MultiTokenLoss, RecurrentTrunk
from mtp_modules.training import MTPModule, MuonWithAdamW, WarmupDecay
from mtp_modules.training.freezing import FREEZABLE
from tests.unit.training.running import VOCAB, data, trainer


def make(optimizer: object, **options: object) -> MTPModule:
    torch.manual_seed(0)
    return MTPModule(
        trunk=RecurrentTrunk(vocab_size=VOCAB, d_model=16),
        heads=LinearHeads(d_model=16, num_horizons=3),
        loss=MultiTokenLoss(),
        optimizer=optimizer,
        **options,
    )


def rate_of(module: MTPModule) -> dict[str, set[float]]:
    rates = {
        id(parameter): group["lr"]
        for group in module.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    return {
        part: {rates[id(parameter)] for parameter in getattr(module.model, part).parameters()}
        for part in ("trunk", "heads", "unembedding")
    }


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MuonWithAdamW])
def test_each_part_has_its_rate(optimizer: type) -> None:
    given = {"lr": 0.5} | ({"adamw_lr": 0.5} if optimizer is MuonWithAdamW else {})
    scaled = make(partial(optimizer, **given), tie_embeddings=False, lr_scales={"trunk": 0.25, "unembedding": 2.0})
    assert rate_of(scaled) == {"trunk": {0.125}, "heads": {0.5}, "unembedding": {1.0}}
    assert rate_of(make(partial(optimizer, **given), tie_embeddings=False)) == {part: {0.5} for part in FREEZABLE}


def test_a_tied_matrix_learns_with_the_trunk() -> None:
    assert rate_of(make(partial(torch.optim.SGD, lr=1.0), lr_scales={"trunk": 0.5}))["unembedding"] == {0.5}


def test_a_step_moves_each_part_by_its_rate_and_the_schedule_scales_both(tmp_path: Path) -> None:
    """Plain gradient descent for one step: what moves is the gradient times the rate."""

    def moved(scales: dict[str, float]) -> dict[str, torch.Tensor]:
        module = make(partial(torch.optim.SGD, lr=0.5), lr_scales=scales, lr_schedule=WarmupDecay(warmup_steps=2))
        before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
        trainer(tmp_path, max_steps=1).fit(module, data())
        return {name: tensor - before[name] for name, tensor in module.model.state_dict().items()}

    plain, scaled = moved({}), moved({"trunk": 0.25})
    for name, change in plain.items():
        factor = 1.0 if name.startswith("heads") else 0.25
        torch.testing.assert_close(scaled[name], factor * change, rtol=1e-4, atol=1e-7)
    assert all(change.any() for change in plain.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr_scales": {"tail": 1.0}}, r"lr_scales may name trunk, heads, unembedding, got 'tail'\."),
        (
            {"lr_scales": {"trunk": 0}},
            r"lr_scales\.trunk must be a finite number above 0, got 0; freeze it to leave it",
        ),
        (
            {"lr_scales": {"unembedding": 2.0}},
            "lr_scales names unembedding, which has nothing to train: it is frozen, ",
        ),
        ({"lr_scales": {"trunk": 2.0}, "freeze": ["trunk"]}, "lr_scales names trunk, which has nothing to train"),
    ],
)
def test_what_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^MTPModule: {sentence}"):
        make(torch.optim.AdamW, **options)
