"""Gradient norms, the conflict of horizons and throughput: against naive twins, in real runs, over two processes."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mtp_modules import ExplicitWeights, LinearHeads, MTPModel, MultiTokenLoss
from mtp_modules.training import (
    GradientConflict,
    MTPModule,
    TokenThroughput,
    gradient_conflict,
    gradient_norms,
    monitoring,
    training_flops,
)
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same, gradients, make_model, random_tokens
from tests.unit.training.running import SaveAt, data, module, trainer

NORMS = ("trunk", "heads", "unembedding")


def naive_norms(model: MTPModel) -> dict[str, float]:
    """Return the norms from every parameter's name and its elements."""
    squares = dict.fromkeys(NORMS, 0.0)
    for name, parameter in model.named_parameters():  # a shared parameter comes once, under its first name
        squares[name.partition(".")[0]] += 0.0 if parameter.grad is None else float((parameter.grad**2).sum())
    return {name: math.sqrt(square) for name, square in squares.items()}


def as_numbers(figures: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", ["linear", "parallel", "recurrent"])
def test_norms_are_those_of_every_parameter_once(heads: str, tied: bool) -> None:
    model = make_model("transformer", heads, tied=tied)
    MultiTokenLoss()(model, random_tokens(2, 9)).loss.backward()
    expected = naive_norms(model)
    if tied:
        assert expected.pop("unembedding") == 0.0
    assert as_numbers(gradient_norms(model)) == pytest.approx(expected, rel=1e-12)
    scaled = as_numbers(gradient_norms(model, loss_scale=4.0))
    assert scaled == pytest.approx({name: norm / 4 for name, norm in expected.items()}, rel=1e-12)


def test_a_part_without_gradients_has_norm_0_and_one_without_parameters_none() -> None:
    assert as_numbers(gradient_norms(make_model("gru", "recurrent", 1))) == {"trunk": 0.0}


class Norms(Callback):
    """Remembers the norms that a naive loop finds just before each step, and those that were logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: MTPModule, *_: Any) -> None:
        self.seen.append(naive_norms(pl_module.model))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        known = trainer.callback_metrics
        self.logged.append({name: float(known.get(f"train/grad_norm/{name}", 0.0)) for name in NORMS})


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 2}], ids=str)
def test_logged_norms_are_those_before_clipping(tmp_path: Path, options: dict[str, Any]) -> None:
    norms = Norms()
    trainer(tmp_path, norms, max_epochs=1, **options).fit(module(tie_embeddings=False), data())
    batches = options.get("accumulate_grad_batches", 1)
    last_of_step = norms.logged[batches - 1 :: batches]
    assert len(last_of_step) == len(norms.seen) > 1
    for logged, seen in zip(last_of_step, norms.seen, strict=True):
        assert logged == pytest.approx(seen, rel=1e-5)
        assert min(logged.values()) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_norms_are_unscaled_under_fp16(tmp_path: Path, fused: bool) -> None:
    """A fused optimizer unscales in its own step, after the norms were taken."""
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        norms, model = Norms(), module()
        model.optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=fused)
        options = {} if scaler is None else {"plugins": MixedPrecision("16-mixed", device="cpu", scaler=scaler)}
        trainer(tmp_path, norms, max_epochs=1, **options).fit(model, data())
        runs.append(norms.logged)
    for plain, scaled in zip(*runs, strict=True):
        assert scaled == pytest.approx(plain, rel=0.05)


floats = st.floats(-10, 10).map(lambda value: value if abs(value) > 1e-100 else 0.0)


@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=8), st.integers(1, 7))
def test_conflict_is_cosine_and_ratio(pairs: list[tuple[float, float]], split: int) -> None:
    near, far = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    cosine, ratio = gradient_conflict(near.tensor_split([split]), far.tensor_split([split]))
    sizes = near.norm(), far.norm()
    if min(sizes) == 0:
        assert float(cosine) == 0.0
    else:
        assert_same(cosine, (near / sizes[0]) @ (far / sizes[1]))
        assert_same(ratio, sizes[1] / sizes[0])


def test_conflict_with_nothing() -> None:
    some, nothing = [torch.ones(3)], [torch.zeros(3)]
    figures = [gradient_conflict(near, far) for near, far in ((some, nothing), (nothing, some), (nothing, nothing))]
    assert [tuple(map(float, pair)) for pair in figures] == [(0.0, 0.0), (0.0, math.inf), (0.0, 0.0)]


class Conflicts(Callback):
    """Computes the conflict anew from the gradients of the step itself, and remembers what was logged."""

    def __init__(self) -> None:
        self.logged: dict[int, tuple[float, float]] = {}
        self.expected: dict[int, tuple[float, float]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: MTPModule, batch: Any, batch_idx: int) -> None:
        state, given_weights = torch.get_rng_state(), pl_module.loss.weights
        found = []
        for horizons in ((0,), (1, 2)):
            torch.set_rng_state(state)
            kept = [weight if h in horizons else 0.0 for h, weight in enumerate(given_weights(3))]
            pl_module.loss.weights = ExplicitWeights(values=kept)
            grads = gradients(pl_module.model, pl_module(batch).loss)
            found.append(torch.cat([grad.flatten() for name, grad in grads.items() if name.startswith("trunk")]))
        pl_module.loss.weights = given_weights
        torch.set_rng_state(state)
        near, far = found
        self.expected[batch_idx] = float(torch.cosine_similarity(near, far, dim=0)), float(far.norm() / near.norm())

    def on_train_batch_end(self, trainer: Trainer, pl_module: MTPModule, o: Any, b: Any, batch_idx: int) -> None:
        known = trainer.callback_metrics
        if "train/grad_cosine" in known:
            self.logged[batch_idx] = float(known["train/grad_cosine"]), float(known["train/grad_ratio"])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_probe_compares_the_gradients_of_the_step(tmp_path: Path, share: float) -> None:
    conflicts = Conflicts()
    run = trainer(tmp_path, conflicts, GradientConflict(every_n_steps=2), max_epochs=1)
    run.fit(module(share_of_positions=share), data())
    assert sorted(conflicts.logged) == [1, 2, 3, 4, 5]
    for step in (1, 3, 5):
        assert conflicts.logged[step] == pytest.approx(conflicts.expected[step], rel=1e-4)
    assert conflicts.logged[2] == conflicts.logged[1]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}], ids=str
)
def test_a_probe_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    states = []
    for callbacks in ((), (GradientConflict(every_n_steps=1),)):
        model = module("recurrent", share_of_positions=0.5)
        run = trainer(tmp_path, *callbacks, **options)
        run.fit(model, data())
        assert ("train/grad_cosine" in run.callback_metrics) == bool(callbacks)
        states.append((model.state_dict(), torch.get_rng_state(), model.training))
    assert_same(states[0][0], states[1][0], tolerance=0)
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


def test_a_probe_that_overflows_logs_nothing(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    run = trainer(tmp_path, GradientConflict(every_n_steps=1), max_epochs=-1, max_steps=2, plugins=plugin)
    model = module()
    model.lr_schedule = None  # torch warns of a schedule that goes on while every step is skipped
    run.fit(model, data())
    assert "train/grad_cosine" not in run.callback_metrics


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda model: setattr(model.model, "heads", LinearHeads(d_model=16, num_horizons=1)),
            r"^GradientConflict: needs at least 2 horizons to compare, got 1; leave the callback out\.$",
        ),
        (
            lambda model: model.model.trunk.requires_grad_(False),
            r"^GradientConflict: needs a trunk that trains, but all of its parameters are frozen; "
            r"leave the callback out\.$",
        ),
    ],
    ids=["one horizon", "frozen"],
)
def test_what_cannot_be_probed_is_refused(tmp_path: Path, change: Callable[[MTPModule], object], sentence: str) -> None:
    model, run = module(), trainer(tmp_path, GradientConflict())
    change(model)
    with pytest.raises(ValueError, match=sentence):
        run.fit(model, data())
    run.validate(model, data(), verbose=False)


def test_a_trunk_in_parts_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, strategy=ModelParallelStrategy(), devices=1)
    with pytest.raises(
        ValueError,
        match=r"^GradientConflict: needs the whole trunk on every rank, which ModelParallelStrategy does not give; "
        r"use DDPStrategy or one device, or leave the callback out\.$",
    ):
        GradientConflict().setup(run, module(), "fit")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (partial(GradientConflict, every_n_steps=0), r"^GradientConflict: every_n_steps must be at least 1, got 0\.$"),
        (
            partial(TokenThroughput, available_flops=0.0),
            r"^TokenThroughput: available_flops must be above 0, got 0\.0; leave it out if it is unknown\.$",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Callback], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(monitoring.time, "perf_counter", lambda: self.now)


class Pass(Callback):
    """Lets a batch take one second, a validation batch a thousand, and remembers the rates."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.rates = clock, []

    def on_before_backward(self, *_: Any) -> None:
        self.clock.now += 1.0

    def on_validation_batch_end(self, *_: Any) -> None:
        self.clock.now += 1000.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        known = trainer.callback_metrics
        if "train/tokens_per_second" in known:
            names = ("tokens_per_second", "samples_per_second", "tflops_per_second", "mfu")
            self.rates.append(tuple(float(known[f"train/{name}"]) for name in names))

    on_train_end = on_train_batch_start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log_every_n_steps": 4},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 4},
        {"val_check_interval": 2, "log_every_n_steps": 3},
        {"num_sanity_val_steps": 2},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_rates_are_right_in_every_kind_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Of 8 rows of 6 positions a second, whatever lies between."""
    clock, model = Clock(monkeypatch), module(share_of_positions=0.5)
    seen = Pass(clock)
    flops = training_flops(model.model, batch_size=8, length=6, share_of_positions=0.5)
    run = trainer(tmp_path, seen, TokenThroughput(available_flops=4.0 * flops), max_epochs=3, **options)
    run.fit(model, data())
    assert len(seen.rates) > 1
    for rates in seen.rates:
        assert rates == pytest.approx((48.0, 8.0, flops / 1e12, 0.25), rel=1e-5)


def test_rates_of_a_resumed_run_know_nothing_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "middle.ckpt"
    trainer(tmp_path, SaveAt(path, 4)).fit(module(), data())
    seen = Pass(Clock(monkeypatch))
    run = trainer(tmp_path, seen, TokenThroughput(available_flops=1e12), log_every_n_steps=3)
    run.fit(module(), data(), ckpt_path=path, weights_only=True)
    assert run.global_step == 12
    assert {rates[:2] for rates in seen.rates} == {(48.0, 8.0)}


def test_ranks_that_share_a_batch_do_not_count_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four devices, two by two in tensor parallel: two batches at once, each of them half the work of a device."""
    clock, model, logged = Clock(monkeypatch), module(), {}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    facts = {"world_size": 4, "precision": "32-true", "global_step": 0, "log_every_n_steps": 1}
    run = Mock(spec=Trainer, strategy=strategy, distributed_sampler_kwargs={"num_replicas": 2}, **facts)
    monkeypatch.setattr(model, "log_dict", logged.update)
    flops = training_flops(model.model, batch_size=8, length=6)
    meter = TokenThroughput(available_flops=float(flops))
    meter.on_train_start(run, model)
    clock.now += 1.0
    run.global_step = 1
    meter.on_train_batch_end(run, model, None, {"tokens": torch.zeros(8, 9, dtype=torch.long)}, 0)
    rates = {"tokens_per_second": 96.0, "samples_per_second": 16.0, "tflops_per_second": flops / 2e12, "mfu": 0.5}
    assert logged == pytest.approx({f"train/{name}": rate for name, rate in rates.items()})


def test_a_run_has_one_meter(tmp_path: Path) -> None:
    own = TokenThroughput(available_flops=1e12)
    for callbacks in ((), (own,)):
        run, model = trainer(tmp_path, *callbacks, max_epochs=1), module()
        run.fit(model, data())
        run.validate(model, data(), verbose=False)
        meters = [callback for callback in run.callbacks if isinstance(callback, TokenThroughput)]
        assert len(meters) == 1
        assert (meters[0] is own) == bool(callbacks)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("16-mixed", torch.float16),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
        ("transformer-engine", torch.float32),
    ],
)
def test_the_peak_is_that_of_the_precision(precision: str, dtype: torch.dtype) -> None:
    assert monitoring._compute_dtype(precision) == dtype


def _sharded_norms() -> dict[str, Tensor]:
    """Shard a model by FSDP2, leave one layer whole, and return the norms of a batch that both ranks share."""
    model = make_model("transformer", "linear", tied=False)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.trunk.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.heads, mesh=mesh)
    MultiTokenLoss()(model, random_tokens(2, 9)).loss.backward()
    return gradient_norms(model)


def test_norms_of_sharded_parameters_are_whole() -> None:
    model = make_model("transformer", "linear", tied=False)
    MultiTokenLoss()(model, random_tokens(2, 9)).loss.backward()
    wanted = {name: torch.tensor(norm, dtype=torch.float64) for name, norm in naive_norms(model).items()}
    for found in run_ranks(_sharded_norms):
        assert_same(found, wanted)


def ddp_module() -> MTPModule:
    model = module("recurrent")
    model.loss = MultiTokenLoss()
    model.optimizer, model.lr_schedule = partial(torch.optim.SGD, lr=0.1), None
    return model


class FirstBatch(Callback):
    """Lets unequally many tokens of each rank count, and remembers the first step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: MTPModule, batch: Any, batch_idx: int) -> None:
        batch["loss_mask"] = torch.arange(9).expand(8, -1) < (9 if trainer.global_rank == 0 else 5)
        self.batch = {name: batch[name] for name in ("tokens", "loss_mask")}


def _probed(folder: Path) -> list[tuple[dict, dict, dict]]:
    """Train a step on each rank's own rows, with a probe and without, and return what came of it."""
    done = []
    for probe in (True, False):
        model, first = ddp_module(), FirstBatch()
        seen = Pass(Clock(pytest.MonkeyPatch()))
        callbacks = [first, seen, GradientConflict(every_n_steps=1)] if probe else [first, seen]
        limits = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
        meter = TokenThroughput(available_flops=training_flops(model.model, batch_size=8, length=6))
        run = trainer(folder, *callbacks, meter, strategy=DDPStrategy(), devices=2, **limits)
        run.fit(model, data())
        assert [rates[:2] + rates[3:] for rates in seen.rates] == [(96.0, 16.0, 1.0)]
        logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("train/grad_")}
        done.append((model.state_dict(), logged, first.batch))
    return done


def test_ranks_add_up_their_gradients_before_they_compare(tmp_path: Path) -> None:
    ((weights, logged, batch), (plain, *_)), ((_, other_logged, other_batch), _) = run_ranks(_probed, tmp_path)
    assert not torch.equal(batch["tokens"], other_batch["tokens"])
    whole = {name: torch.cat((batch[name], other_batch[name])) for name in batch}
    model = ddp_module()
    found = []
    for kept in ([1.0, 0.0, 0.0], [0.0, 1.0, 1.0]):
        grads = gradients(model.model.trunk, model(whole, weights=kept).loss)
        found.append(torch.cat([grad.flatten() for grad in grads.values()]))
    expected = torch.cosine_similarity(*found, dim=0), found[1].norm() / found[0].norm()
    for figures in (logged, other_logged):
        assert figures["train/grad_cosine"] == pytest.approx(float(expected[0]), rel=1e-4)
        assert figures["train/grad_ratio"] == pytest.approx(float(expected[1]), rel=1e-4)
    assert_same(weights, plain, tolerance=0)
