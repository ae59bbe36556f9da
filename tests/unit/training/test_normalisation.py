"""One optimizer step is the same however its batch is split, and trains what it is meant to train."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from mtp_modules import AuxiliaryWeights, GeometricWeights, MultiTokenLoss
from mtp_modules.core.objective import HorizonWeights
from mtp_modules.data import CountsAhead, TextDataModule
from mtp_modules.losses import LinearWeightSchedule
from mtp_modules.metrics.functional import counts, figures
from mtp_modules.training import MTPModule, MuonWithAdamW
from mtp_modules.training.normalisation import run_length
from tests.helpers import HEADS, TRUNKS, TRUNKS_WITH_HEADS, assert_same, covering, float64, randomise
from tests.unit.training.running import data, module, trainer

H = 3


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(40):
        text = "".join(chr(1 + (index * 7 + place) % 10) for place in range(5 + index % 9))
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return folder


def texts(corpus: Path, batch_size: int) -> TextDataModule:
    return TextDataModule(
        sources=[str(corpus)],
        window=8,
        lookahead=H,
        batch_size=batch_size,
        val_share=0.0,
        test_share=0.0,
    )


def build(trunk: str = "transformer", heads: str = "linear", **kwargs: Any) -> MTPModule:
    with float64():
        parts = {"trunk": TRUNKS[trunk](), "heads": HEADS[heads](H)}
        for part in parts.values():
            randomise(part)
        defaults = {
            "loss": MultiTokenLoss(weights=GeometricWeights(gamma=0.5)),
            "optimizer": partial(torch.optim.AdamW, lr=0.01),
        }
        return MTPModule(**parts, **(defaults | kwargs))


class Batches(Callback):
    """Remembers whether documents met in a row, and how many batches were trained on."""

    def __init__(self) -> None:
        self.documents: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: dict, batch_idx: int) -> None:
        self.documents.append("document_ids" in batch)


def fit(folder: Path, model: MTPModule, rows: LightningDataModule, *callbacks: Callback, **kwargs: Any) -> MTPModule:
    run = trainer(
        folder, *callbacks, max_epochs=1, gradient_clip_val=0.5, precision="64-true", limit_val_batches=0, **kwargs
    )
    run.fit(model, rows)
    return model


WITH_ACCUMULATION = ("linear", "sequential_shared", "early_exit")
"""How the parts of a batch add up for all heads is a property of the loss; a whole run shows that it is asked for."""


@pytest.mark.parametrize(
    "heads", [pytest.param(name, marks=() if name in WITH_ACCUMULATION else pytest.mark.nightly) for name in HEADS]
)
def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, corpus: Path, heads: str) -> None:
    large = fit(tmp_path, build(heads=heads), texts(corpus, 8), limit_train_batches=4)
    seen = Batches()
    kwargs = {"limit_train_batches": 32, "accumulate_grad_batches": 8}
    small = fit(tmp_path, build(heads=heads), texts(corpus, 1), seen, **kwargs)
    assert len(set(seen.documents)) == 2
    before = build(heads=heads).state_dict()
    assert (large.state_dict()["model.unembedding.weight"] - before["model.unembedding.weight"]).abs().max() > 1e-3
    assert_same(small.state_dict(), large.state_dict())


def test_an_incomplete_last_step_is_divided_by_what_it_saw(tmp_path: Path, corpus: Path) -> None:
    gradients: list[list[torch.Tensor]] = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: MTPModule, optimizer: Any) -> None:
            gradients.append([parameter.grad.clone() for parameter in pl_module.parameters()])

    options = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    fit(tmp_path, build(**options), texts(corpus, 1), Gradients(), limit_train_batches=11, accumulate_grad_batches=8)
    accumulated = gradients.copy()
    assert len(accumulated) == 2
    gradients.clear()
    fit(tmp_path, build(**options), texts(corpus, 8), Gradients(), limit_train_batches=1)
    assert_same(accumulated[0], gradients[0])
    last = list(itertools.islice(texts(corpus, 1).train_dataloader(), 8, 11))
    tokens = torch.cat([batch["tokens"] for batch in last])
    documents = torch.cat([batch.get("document_ids", torch.zeros_like(batch["tokens"])) for batch in last])
    model = build()
    terms = model.loss(model.model, tokens, document_ids=documents)
    wanted = torch.autograd.grad(terms.loss, list(model.parameters()))
    assert_same(accumulated[1], list(wanted))


class Steps(Callback):
    """Remembers the batches, the gradient and the logged figures of every step."""

    def __init__(self) -> None:
        self.batches: list[list[dict]] = [[]]
        self.gradients: list[list[torch.Tensor]] = []
        self.figures: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: MTPModule, batch: dict, batch_idx: int) -> None:
        if len(self.batches) == len(self.gradients):
            self.batches.append([])
        self.batches[-1].append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: MTPModule, optimizer: Any) -> None:
        self.gradients.append([parameter.grad.clone() for parameter in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if len(self.gradients) > len(self.figures):
            known = trainer.callback_metrics.items()
            left_out = ("per_second", "grad_norm", "train/lr")
            self.figures.append({name: float(value) for name, value in known if not any(x in name for x in left_out)})


def test_a_scheduled_accumulation_is_exact_and_logged_figures_are_those_of_the_step(
    tmp_path: Path, corpus: Path
) -> None:
    """Epochs of 4 + 4 and of 3 + 3 + 2 batches of one row, against one batch of those rows."""
    seen, lengths = Steps(), []

    class Length(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: MTPModule) -> None:
            lengths.append(run_length(trainer))

    scheduled = GradientAccumulationScheduler({0: 4, 1: 3})
    options = {"loss": MultiTokenLoss(weights=GeometricWeights(gamma=0.5), distillation=0.3)}
    made = build(optimizer=partial(torch.optim.SGD, lr=0.0), **options)
    run = trainer(
        tmp_path,
        seen,
        scheduled,
        Length(),
        max_epochs=2,
        precision="64-true",
        limit_val_batches=0,
        limit_train_batches=8,
    )
    run.fit(made, texts(corpus, 1))
    assert [len(step) for step in seen.batches] == [4, 4, 3, 3, 2]
    assert lengths == [5]
    model = build(**options)
    for batches, gradient, logged in zip(seen.batches, seen.gradients, seen.figures, strict=True):
        tokens = torch.cat([batch["tokens"] for batch in batches])
        documents = torch.cat([batch.get("document_ids", torch.zeros_like(batch["tokens"])) for batch in batches])
        terms = model.loss(model.model, tokens, document_ids=documents)
        assert_same(gradient, list(torch.autograd.grad(terms.loss, list(model.parameters()))))
        expected = {**figures(counts(terms, (1, 5)), (1, 5)), "loss": terms.loss.detach()}
        assert logged == pytest.approx({f"train/{name}": float(value) for name, value in expected.items()}, rel=1e-6)
    sentence = (
        r"^trainer\.accumulate_grad_batches: is 2, but GradientAccumulationScheduler sets it to 4 in the first epoch; "
        r"leave one of them out\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, GradientAccumulationScheduler({0: 4}), accumulate_grad_batches=2).fit(module(), data())


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_a_loader_that_knows_nothing_of_what_follows_is_refused(tmp_path: Path) -> None:
    rows = data()
    loader = DataLoader([dict(batch) for batch in rows.train_dataloader()], batch_size=None)
    sentence = (
        r"^accumulate_grad_batches: is 3, but the batches do not carry the target counts of those that follow; "
        r"use a data module of mtp_modules, or wrap the training loader in mtp_modules\.data\.CountsAhead\(loader, "
        r"horizons=model\.horizons, batches=accumulate_grad_batches\)\.$"
    )
    options = {"accumulate_grad_batches": 3, "max_epochs": 1, "limit_val_batches": 0}
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, **options).fit(module(), loader)
    model = module()
    trainer(tmp_path, **options).fit(model, CountsAhead(loader, horizons=model.horizons, batches=3))
    same = module()
    trainer(tmp_path, **options).fit(same, data())
    assert_same(model.state_dict(), same.state_dict(), tolerance=0)


def test_weights_follow_the_run(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    class Weights(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: MTPModule, *_: Any) -> None:
            seen.append(pl_module.horizon_weights())

    schedule = LinearWeightSchedule(start=AuxiliaryWeights(weight=1.0), end=AuxiliaryWeights(weight=0.0))
    model = module()
    model.loss.weights = schedule
    trainer(tmp_path, Weights(), max_steps=8, max_epochs=-1).fit(model, data())
    assert seen == [[1.0, pytest.approx(1 - step / 8), pytest.approx(1 - step / 8)] for step in range(8)]


def test_a_horizon_of_weight_zero_learns_nothing(tmp_path: Path, corpus: Path) -> None:
    class NearOnly(HorizonWeights):
        def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
            return [1.0] + [0.0] * (num_horizons - 1)

    before = build().state_dict()
    model = build(loss=MultiTokenLoss(weights=NearOnly()), optimizer=partial(torch.optim.SGD, lr=0.1))
    after = fit(tmp_path, model, texts(corpus, 8), limit_train_batches=2).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.heads.maps.0.weight" in changed
    assert not {"model.heads.maps.1.weight", "model.heads.maps.2.weight"} & changed


def test_schedules_refuse_a_run_without_an_end(tmp_path: Path) -> None:
    model = module()
    model.loss.weights = LinearWeightSchedule(start=AuxiliaryWeights(weight=1.0), end=AuxiliaryWeights(weight=0.0))
    model.lr_schedule = None
    with pytest.raises(
        ValueError,
        match=r"^max_steps: is not given, so schedules cannot know how long the run is; set max_steps or max_epochs\.$",
    ):
        trainer(tmp_path, max_epochs=-1).fit(model, data())


OPTIMIZERS: dict[str, Callable] = {
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "muon": partial(MuonWithAdamW, lr=0.01, adamw_lr=0.01, weight_decay=0.1),
}


FREEZES: list[tuple[str, ...]] = [("trunk",), ("heads",), ("unembedding",), ("trunk", "unembedding")]


@pytest.mark.parametrize(
    ("trunk", "heads", "frozen"),
    [
        *(pytest.param(*pair.values, (), marks=pair.marks) for pair in TRUNKS_WITH_HEADS),
        *covering(("transformer", "gru"), HEADS, FREEZES, strength=1),
    ],
)
def test_everything_trains_but_what_is_frozen(
    tmp_path: Path, corpus: Path, trunk: str, heads: str, frozen: tuple[str, ...]
) -> None:
    model = build(trunk, heads, optimizer=OPTIMIZERS["muon"], tie_embeddings=False, freeze=frozen)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    without: set[str] = set()
    groups: list[int] = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: MTPModule, optimizer: Any) -> None:
            named = pl_module.named_parameters()
            without.update(name for name, p in named if p.grad is None or not p.grad.any())
            groups.extend(id(p) for group in optimizer.param_groups for p in group["params"])

    fit(tmp_path, model, texts(corpus, 4), Gradients(), limit_train_batches=1)
    meant = {name for name in before if not name.startswith(tuple(f"model.{part}." for part in frozen))}
    parameters = dict(model.named_parameters())
    assert meant
    assert without == before.keys() - meant
    assert sorted(groups) == sorted(id(parameters[name]) for name in meant)
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert moved == meant


def test_a_frozen_trunk_is_in_evaluation_mode_and_makes_no_graph(tmp_path: Path, corpus: Path) -> None:
    seen: list[tuple[bool, bool, bool]] = []
    model = build(freeze=["trunk"])
    model.model.trunk.layers[0].register_forward_hook(
        lambda layer, *_: seen.append((torch.is_grad_enabled(), layer.training, model.model.heads.training))
    )
    fit(tmp_path, model, texts(corpus, 4), limit_train_batches=2)
    assert seen == [(False, False, True)] * 2
    assert not model.model.unembedding.weight.requires_grad


@pytest.mark.parametrize(
    ("freeze", "sentence"),
    [
        (["trunks"], r"MTPModule: freeze may hold trunk, heads, unembedding, got 'trunks'\."),
        (
            ["unembedding"],
            r"MTPModule: freeze holds unembedding, which is the trunk's embedding; freeze the trunk too, or set "
            r"tie_embeddings to false\.",
        ),
        (["trunk", "heads"], r"MTPModule: freeze holds trunk, heads, which leaves nothing to train; leave one out\."),
    ],
)
def test_what_cannot_be_frozen(freeze: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        build(freeze=freeze)
