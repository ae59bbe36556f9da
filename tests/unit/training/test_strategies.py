"""What a trainer must not be asked for is refused in one sentence, before any work."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from mtp_modules import LinearHeads, MultiTokenLoss, RecurrentTrunk
from mtp_modules.training import (
    MTPModule,
    check_gradients,
    check_strategy_name,
    check_trainer,
    fill_data_parallel_size,
)
from mtp_modules.training.strategies import FSDP1


def make(strategy: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return Trainer(strategy=strategy, **(quiet | {"devices": 1, "inference_mode": False} | options))


def sharded(data: Any = "auto", tensor: Any = 1) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)


REFUSED = {
    "static graph": (
        lambda: make(DDPStrategy(static_graph=True), accumulate_grad_batches=2),
        "trainer.strategy: DDPStrategy with static_graph: true does not go with accumulate_grad_batches=2: torch fails "
        "in the first step; leave static_graph out.",
    ),
    "float16 weights": (
        lambda: make("auto", precision="16-true"),
        "trainer.precision: 16-true keeps weights and optimizer state in float16, where small gradients are zero; take "
        "bf16-mixed or bf16-true, or 16-mixed where the GPU has no bfloat16.",
    ),
    "inference mode": (
        lambda: make(sharded(), inference_mode=True),
        "trainer.inference_mode: must be false with ModelParallelStrategy: FSDP2 gathers weights in place, which "
        "inference mode forbids.",
    ),
}


@pytest.mark.parametrize(("build", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_trainer_that_would_go_wrong_is_refused(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        check_trainer(build())
    assert str(error.value) == sentence


def test_lightnings_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("auto")
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy())  # a trainer without GPUs would not take it
    with pytest.raises(ValueError, match=rf"^trainer\.strategy: {FSDP1}$"):
        check_trainer(trainer)


@pytest.mark.parametrize(
    "name", ["fsdp", "fsdp_cpu_offload", "FSDPStrategy", "lightning.pytorch.strategies.FSDPStrategy"]
)
def test_lightnings_fsdp1_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer\.strategy: {FSDP1}$"):
        check_strategy_name(name)


@pytest.mark.parametrize("name", ["auto", "ddp", "lightning.pytorch.strategies.ModelParallelStrategy", DDPStrategy()])
def test_other_strategies_are_not(name: Any) -> None:
    check_strategy_name(name)


@pytest.mark.parametrize(
    "build",
    [
        lambda: make(DDPStrategy(static_graph=True)),
        lambda: make(DDPStrategy(), accumulate_grad_batches=2),
        lambda: make(sharded(2), devices=2, accumulate_grad_batches=2, gradient_clip_val=1.0),
        lambda: make(sharded(1, 2), devices=2),
        lambda: make(ModelParallelStrategy(), devices=2),
        lambda: make("auto", inference_mode=True, precision="bf16-mixed"),
    ],
)
def test_what_goes_together_passes(build: Any) -> None:
    check_trainer(build())


@pytest.mark.parametrize(("devices", "tensor", "expected"), [(4, 1, 4), (4, 2, 2), (1, 1, 1)])
def test_data_parallelism_takes_what_tensor_parallelism_leaves(devices: int, tensor: int, expected: int) -> None:
    trainer = make(sharded("auto", tensor), devices=devices)
    fill_data_parallel_size(trainer)
    assert trainer.strategy._data_parallel_size == expected


def test_a_number_that_is_given_stays() -> None:
    trainer = make(sharded(3, 1), devices=4)
    fill_data_parallel_size(trainer)
    assert trainer.strategy._data_parallel_size == 3


def test_processes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^trainer\.strategy: tensor_parallel_size \(3\) must divide the number of processes \(4\); change "
        r"devices\.$",
    ):
        fill_data_parallel_size(make(sharded("auto", 3), devices=4))


def after_backward(*, unused: bool) -> MTPModule:
    module = MTPModule(
        trunk=RecurrentTrunk(vocab_size=9, d_model=8),
        heads=LinearHeads(d_model=8, num_horizons=2),
        loss=MultiTokenLoss(),
    )
    if unused:
        module.model.extra = nn.Linear(2, 2)
    module({"tokens": torch.zeros(2, 5, dtype=torch.long)}).loss.backward()
    return module


def test_ddp_refuses_parameters_that_get_no_gradient() -> None:
    with pytest.raises(
        ValueError,
        match=r"^trainer\.strategy: DDP waits for gradients that model\.extra\.weight and 1 other parameters never "
        r"get; leave them out of the model, freeze them, or take ddp_find_unused_parameters_true\.$",
    ):
        check_gradients(make("ddp"), after_backward(unused=True))


@pytest.mark.parametrize(
    ("strategy", "unused"), [("ddp", False), ("ddp_find_unused_parameters_true", True), ("auto", True)]
)
def test_others_need_none(strategy: str, unused: bool) -> None:
    check_gradients(make(strategy), after_backward(unused=unused))
