"""First values of a model that was built without memory, and what sharding refuses."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mtp_modules import (
    ChainedHeads,
    ConditionedHeads,
    EarlyExitHeads,
    LinearHeads,
    MTPModel,
    MultiTokenLoss,
    ParallelHeads,
    RecurrentHeads,
    RecurrentTrunk,
    TransformerTrunk,
    TransitionHeads,
)
from mtp_modules.core import Heads, Trunk
from mtp_modules.training import MTPModule, Sharding, materialize
from tests.unit.training.running import data, trainer

WIDTH, CPU = 64, torch.device("cpu")
TRUNKS: dict[str, Callable[[], Trunk]] = {
    "transformer": lambda: TransformerTrunk(
        vocab_size=96, d_model=WIDTH, num_layers=3, num_heads=4, num_previous=1, feature_layers=[0, 2]
    ),
    **{cell: lambda cell=cell: RecurrentTrunk(vocab_size=96, d_model=WIDTH, cell=cell) for cell in ("rnn", "lstm")},
}
HEADS: dict[str, Callable[[], Heads]] = {
    "linear": lambda: LinearHeads(d_model=WIDTH, num_horizons=3),
    "parallel": lambda: ParallelHeads(d_model=WIDTH, num_horizons=3, num_heads=4),
    "recurrent": lambda: RecurrentHeads(d_model=WIDTH, num_horizons=3),
    "causal": lambda: ChainedHeads(d_model=WIDTH, num_horizons=3, num_heads=4),
    "conditioned": lambda: ConditionedHeads(d_model=WIDTH, num_horizons=3, num_layers=2),
    "transition": lambda: TransitionHeads(heads=HEADS["linear"](), vocab_size=96, rank=8),
    "early exit": lambda: EarlyExitHeads(d_model=WIDTH, num_horizons=3, num_features=2),
}
SHAPES = [{"tie_embeddings": True}, {"tie_embeddings": False, "own_unembeddings": True, "output_bias": True}]


@pytest.mark.parametrize("options", SHAPES, ids=["tied", "own matrices"])
@pytest.mark.parametrize(
    ("trunk", "heads"),
    [*zip(TRUNKS, HEADS, strict=False), *(("transformer", heads) for heads in list(HEADS)[len(TRUNKS) :])],
)
def test_a_model_from_the_meta_device_starts_like_one_with_memory(trunk: str, heads: str, options: dict) -> None:
    expected = MTPModel(trunk=TRUNKS[trunk](), heads=HEADS[heads](), **options)
    with torch.device("meta"):
        model = MTPModel(trunk=TRUNKS[trunk](), heads=HEADS[heads](), **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, CPU)
    found = dict(model.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys(), "what is tied must stay tied"
    for name, parameter in expected.named_parameters():
        spread = (float(values.detach().std(correction=0)) for values in (found[name], parameter))
        assert next(spread) == pytest.approx(next(spread), rel=0.15), name
        assert float((found[name] - parameter).mean().detach().abs()) < 0.05, name
    states = model(torch.zeros(1, 9, dtype=torch.long))
    assert all(state.isfinite().all() for state in states)


def test_a_parent_has_the_last_word() -> None:
    with torch.device("meta"):
        heads = LinearHeads(d_model=8, num_horizons=2)
    materialize(heads, CPU)
    for linear in heads.maps:  # rotations, not the uniform numbers of nn.Linear
        torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(8), atol=1e-5, rtol=0)


def test_a_model_with_memory_is_left_as_it_is() -> None:
    linear = nn.Linear(3, 3)
    before = linear.weight.detach().clone()
    materialize(linear, CPU)
    assert torch.equal(linear.weight, before)


class Forgets(nn.Module):
    """Resets one of its two parameters."""

    def __init__(self, reset: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2))
        if reset:
            self.reset_parameters = lambda: nn.init.zeros_(self.one)


class Counts(nn.Module):
    """Has a buffer of integers, and no way to set it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("build", "name"),
    [(Forgets, "Forgets.two"), (lambda: Forgets(reset=False), "Forgets.one"), (Counts, "Counts.count")],
)
def test_what_is_not_set_is_refused(build: Callable[[], nn.Module], name: str) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2), build())
    sentence = (
        f"materialize: {name} gets no value from reset_parameters; set it there, or do not build the model on the meta "
        "device."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        materialize(module, CPU)


def test_a_model_that_is_partly_there_is_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(
        ValueError,
        match=r"^materialize: Linear\.weight has a value, but other parameters are on the meta device; build the whole "
        r"model there, or none of it\.$",
    ):
        materialize(module, CPU)


def test_one_device_trains_a_model_from_the_meta_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = MTPModule(
            trunk=RecurrentTrunk(vocab_size=24, d_model=16),
            heads=LinearHeads(d_model=16, num_horizons=3),
            loss=MultiTokenLoss(),
        )
    run = trainer(tmp_path, max_steps=2, max_epochs=-1)
    run.fit(module, data())
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert float(run.validate(module, data(), verbose=False)[0]["val/loss/head_1"]) > 0


@pytest.mark.parametrize("name", ["param_dtype", "reduce_dtype"])
def test_float16_needs_a_scaler_that_sharding_has_not(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^Sharding: {name} must be one of bfloat16, float32, float64, got 'float16'\.$"
    ):
        Sharding(**{name: "float16"})


def test_sharding_without_a_strategy_that_shards_is_refused(tmp_path: Path) -> None:
    module = MTPModule(
        trunk=RecurrentTrunk(vocab_size=24, d_model=16),
        heads=LinearHeads(d_model=16, num_horizons=3),
        loss=MultiTokenLoss(),
        sharding=Sharding(param_dtype="bfloat16"),
    )
    with pytest.raises(
        ValueError,
        match=r"^model\.sharding: needs trainer\.strategy ModelParallelStrategy; take that, or leave sharding out\.$",
    ):
        trainer(tmp_path).fit(module, data())
