"""The LightningModule in a real trainer: it learns, logs what it says, and resumes exactly."""

import csv
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from mtp_modules import ExplicitWeights, LinearHeads, MultiTokenLoss, RecurrentTrunk
from mtp_modules.objectives import FutureBagOfWords, NextSpan, TokenOrder
from mtp_modules.training import GradientConflict, MTPModule, TokenThroughput
from tests.architecture.imports import ROOT
from tests.helpers import assert_same, random_tokens
from tests.unit.training.running import HEADS, SaveAt, data, module, trainer


class Log(Callback):
    """Remembers what every step logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


TRAINING_ONLY = {
    "train/loss",
    "train/lr",
    "train/grad_norm/trunk",
    "train/grad_norm/heads",
    "train/tokens_per_second",
    "train/samples_per_second",
    "train/tflops_per_second",
}
OPTIONAL = {"train/grad_norm/unembedding", "train/mfu", "train/grad_cosine", "train/grad_ratio"}


def keys(stage: str) -> set[str]:
    by_head = ("loss", "perplexity", "accuracy", "top5_accuracy")
    return {f"{stage}/{name}/head_{h}" for name in by_head for h in (1, 2, 3)} | {f"{stage}/accepted_length"}


@pytest.mark.parametrize("heads", HEADS)
def test_the_loss_falls_for_every_head(tmp_path: Path, heads: str) -> None:
    log = Log()
    trainer(tmp_path, log, max_epochs=8).fit(module(heads), data())
    first, last = log.steps[0], log.steps[-1]
    for name in ("train/loss", *(f"train/loss/head_{h}" for h in (1, 2, 3))):
        assert last[name] < 0.6 * first[name], name


def test_every_documented_key_is_logged_and_no_other(tmp_path: Path) -> None:
    model, rows, log = module(), data(), Log()
    run = trainer(tmp_path, log)
    run.fit(model, rows)
    assert log.steps[1].keys() == keys("train") | TRAINING_ONLY
    assert set(run.callback_metrics) == keys("train") | TRAINING_ONLY | keys("val")
    validated = run.validate(model, rows, verbose=False)[0]
    assert validated.keys() == keys("val")
    assert run.test(model, rows, verbose=False)[0].keys() == keys("test")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_a_run_may_convert_the_whole_model(tmp_path: Path, precision: str) -> None:
    log = Log()
    trainer(tmp_path, log, max_steps=2, max_epochs=-1, precision=precision).fit(module(), data())
    assert log.steps[-1]["train/loss"] < 20


def test_logged_figures_are_those_of_the_loss(tmp_path: Path) -> None:
    model, rows = module(), data(num_val=8)
    logged = trainer(tmp_path).validate(model, rows, verbose=False)[0]
    (batch,) = rows.val_dataloader()
    terms = model.eval()(batch)
    for h in range(3):
        assert logged[f"val/loss/head_{h + 1}"] == pytest.approx(float(terms.nll[h]), rel=1e-6)
        hits = (terms.rank[:, :, h] == 0) & terms.valid[:, :, h]
        assert logged[f"val/accuracy/head_{h + 1}"] == pytest.approx(float(hits.sum() / terms.valid[:, :, h].sum()))


def test_validation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    figures = [trainer(tmp_path).validate(module(), data(batch_size=size), verbose=False)[0] for size in (3, 16)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_the_training_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    log = Log()
    trainer(tmp_path, log, max_steps=1, max_epochs=-1).fit(module(), data())
    step = log.steps[0]
    weighted = sum(0.5**h * step[f"train/loss/head_{h + 1}"] for h in range(3))
    assert step["train/loss"] == pytest.approx(weighted, rel=1e-5)


def test_the_schedule_scales_the_learning_rate(tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, Rates(), max_steps=12, max_epochs=-1).fit(module(), data())
    expected = [0.02 * module().lr_schedule(step, 12) for step in range(1, 13)]
    assert rates == pytest.approx(expected)


def test_the_optimizer_gets_matrices_apart(tmp_path: Path) -> None:
    model = module("recurrent")
    trainer(tmp_path, max_steps=1, max_epochs=-1).fit(model, data())
    matrices, others = model.optimizers().param_groups
    assert (matrices["use_muon"], others["use_muon"]) == (True, False)
    assert {id(p) for p in matrices["params"]} == {
        id(layer.weight)
        for layer in (model.model.heads.from_state, model.model.heads.from_token, model.model.heads.out)
    }


@pytest.mark.parametrize(("step", "share_of_positions"), [(4, 1.0), (4, 0.5), (6, 0.5), (9, 0.5)])
def test_a_resumed_run_ends_at_the_same_weights(tmp_path: Path, step: int, share_of_positions: float) -> None:
    path = tmp_path / "middle.ckpt"
    whole = module("recurrent", share_of_positions=share_of_positions)
    trainer(tmp_path, SaveAt(path, step)).fit(whole, data())
    resumed = module("recurrent", share_of_positions=share_of_positions)
    torch.manual_seed(step)
    run = trainer(tmp_path)
    run.fit(resumed, data(), ckpt_path=path, weights_only=True)
    assert run.global_step == 12
    assert_same(resumed.state_dict(), whole.state_dict(), tolerance=0)


def test_predictions_are_the_most_likely_tokens(tmp_path: Path) -> None:
    model, rows = module(), data()
    batches = trainer(tmp_path).predict(model, rows)
    assert torch.equal(torch.cat([batch["tokens"] for batch in batches]), torch.from_numpy(rows.rows("test").tokens))
    for batch in batches:
        assert batch["predicted"].shape == (*batch["tokens"][:, :-3].shape, 3)
        with torch.inference_mode():
            states = model.model(batch["tokens"])
            logits = [model.model.unembedding.logits(state) for state in states]
        assert torch.equal(batch["predicted"], torch.stack(logits, dim=-2).argmax(dim=-1))


def test_weights_that_do_not_fit_the_heads_are_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"^ExplicitWeights: values holds 2 weights for 3 horizons; give one per horizon\.$"
    ):
        MTPModule(
            trunk=RecurrentTrunk(vocab_size=9, d_model=8),
            heads=LinearHeads(d_model=8, num_horizons=3),
            loss=MultiTokenLoss(weights=ExplicitWeights(values=[1.0, 0.5])),
        )


def test_the_docstring_names_the_keys() -> None:
    documented = inspect.getdoc(MTPModule)
    for key in ("loss/head_h", "perplexity/head_h", "accuracy/head_h", "top5_accuracy/head_h", "accepted_length"):
        assert f"``{key}``" in documented


def test_the_page_names_every_key_and_no_other() -> None:
    page = (ROOT / "docs/logging.md").read_text(encoding="utf-8")
    by_head = {re.sub(r"head_\d", "head_h", key.replace("val/", "*/")) for key in keys("val")}
    table = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    word = NextSpan(d_model=1, vocab_size=1, level="word")
    auxiliary = {f"*/{kind.name}/{figure}" for kind in (TokenOrder, FutureBagOfWords, word) for figure in kind.figures}
    assert table == by_head | TRAINING_ONLY | OPTIONAL | auxiliary


def test_every_optional_key_is_logged_when_it_is_asked_for(tmp_path: Path) -> None:
    run = trainer(tmp_path, GradientConflict(every_n_steps=1), TokenThroughput(available_flops=1e12), max_epochs=1)
    run.fit(module(tie_embeddings=False), data())
    assert set(run.callback_metrics) == keys("train") | TRAINING_ONLY | OPTIONAL | keys("val")


@pytest.mark.parametrize("every", [0, 2, 3])
def test_loggers_write_what_was_measured_at_that_step(tmp_path: Path, every: int) -> None:
    """What is logged is of the step that loggers write, and not of an earlier one."""
    log = Log()
    trainer(tmp_path, log, max_epochs=1).fit(module(), data())
    run = trainer(tmp_path, max_epochs=1, log_every_n_steps=every, logger=CSVLogger(tmp_path))
    run.fit(module(), data())
    path = Path(run.logger.log_dir) / "metrics.csv"
    with path.open(encoding="utf-8") as file:
        written = [row for row in csv.DictReader(file) if row.get("train/loss")]
    assert [int(row["step"]) for row in written] == ([] if every == 0 else list(range(every - 1, 6, every)))
    for row in written:
        for key in ("train/loss", "train/loss/head_2", "train/grad_norm/trunk"):
            assert float(row[key]) == pytest.approx(log.steps[int(row["step"])][key], rel=1e-6)


def test_predictions_use_the_matrix_of_each_horizon() -> None:
    trained = MTPModule(
        trunk=RecurrentTrunk(vocab_size=11, d_model=8),
        heads=LinearHeads(d_model=8, num_horizons=3),
        loss=MultiTokenLoss(),
        own_unembeddings=True,
        output_bias=True,
    )
    tokens = random_tokens(2, 9)
    predicted = trained.predict_step({"tokens": tokens}, 0)["predicted"]
    for index, state in enumerate(trained.model(tokens)):
        weight, bias = trained.model.unembedding.matrix(index)
        assert bias is not None
        assert torch.equal(predicted[:, :, index], (state @ weight.T + bias).argmax(dim=-1))
    assert trained.model.unembedding.matrix(1).weight is not trained.model.unembedding.weight
