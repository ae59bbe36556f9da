"""A run that was stopped ends where an uninterrupted one does, and its settings are those it is configured with now."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from mtp_modules import GeometricWeights, MultiTokenLoss, UniformWeights
from mtp_modules.core.checks import InputError
from mtp_modules.training import MTPModule, WarmupDecay
from mtp_modules.training.resuming import check_resumable
from tests.resuming import CASES, MUON, SaveAt, data, hash_of, hashes, module
from tests.unit.training.running import trainer

USUAL = (
    "float64",
    "overfitting",
    "overfitting, accumulated",
    "shuffled loader by 2",
    "generated loader by 3",
    "stateful loader by 3",
    "sized loader for epochs",
)
"""What every session tries; the nightly one tries the others."""


QUIET = "ignore:.*(does not have many workers|Consider using|overfit|seems to be|no .val_dataloader)"


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in CASES]
)
def test_stopped_twice_a_run_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    single = CASES[name]["trainer"].get("accumulate_grad_batches", 1) == 1
    whole, stopped = hashes(name, tmp_path, (4, 11) if single else (2, 4))
    assert stopped == whole


@pytest.mark.slow
@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1, 3, 5, 6, 7])
def test_stopped_after_any_step(tmp_path: Path, name: str, step: int) -> None:
    whole, stopped = hashes(name, tmp_path, (step,))
    assert stopped == whole


# Other settings.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return checkpoints after 4 steps of 8, by what trained them."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for name, options in STARTS.items():
        found[name] = folder / f"{name}.ckpt"
        run = trainer(folder, SaveAt(found[name], 4), max_steps=8, max_epochs=-1, gradient_clip_val=1.0)
        run.fit(module(**options), data())
    return found


STARTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "constant": {"schedule": None},
    "muon": {"optimizer": MUON},
    "frozen": {"freeze": ("trunk",)},
}


class Settings(Callback):
    """Remembers the settings of every step."""

    def __init__(self) -> None:
        self.steps: list[list[dict[str, Any]]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: MTPModule, optimizer: Any) -> None:
        keep = ("lr", "betas", "weight_decay", "momentum")
        self.steps.append([{key: group.get(key) for key in keep} for group in optimizer.param_groups])


def resume(start: Path, folder: Path, caplog: Any, rows: Any = None, **options: Any) -> tuple[Any, Any, list[str]]:
    """Continue, and return the module, the settings of each step and the lines that say what changed."""
    seen, more = Settings(), {key: options.pop(key) for key in ("gradient_clip_val", "max_steps") if key in options}
    run = trainer(folder, seen, **({"max_steps": 8, "max_epochs": -1, "gradient_clip_val": 1.0} | more))
    made = module(**options)
    with caplog.at_level(logging.INFO):
        run.fit(made, rows or data(), ckpt_path=start, weights_only=True)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Resumed with other")]
    return made, seen.steps, lines


ADAM = partial(torch.optim.AdamW, lr=0.02)
CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "rate": ("adamw", {"optimizer": partial(ADAM, lr=0.005)}, "optimizer lr 0.02 -> 0.005"),
    "decay": ("adamw", {"optimizer": partial(ADAM, weight_decay=0.3)}, "optimizer weight_decay 0.01 -> 0.3"),
    "betas": ("adamw", {"optimizer": partial(ADAM, betas=(0.8, 0.9))}, "optimizer betas (0.9, 0.999) -> (0.8, 0.9)"),
    "muon": (
        "muon",
        {"optimizer": partial(MUON, lr=0.01, momentum=0.5)},
        "optimizer lr 0.02 -> 0.01; optimizer momentum 0.95 -> 0.5",
    ),
    "no schedule": ("adamw", {"schedule": None}, "lr_schedule WarmupDecay -> nothing"),
    "a schedule": ("constant", {}, "lr_schedule nothing -> WarmupDecay"),
    "another schedule": (
        "adamw",
        {"schedule": WarmupDecay(warmup_steps=6, shape="cosine")},
        "lr_schedule.warmup_steps 3 -> 6; lr_schedule.shape 'linear' -> 'cosine'",
    ),
    "scales": (
        "adamw",
        {"lr_scales": {"trunk": 0.1}},
        "lr_scales {} -> {'trunk': 0.1}; optimizer lr 0.02 -> 0.002",
    ),
    "clipping": ("adamw", {"gradient_clip_val": 0.1}, "gradient_clip_val 1.0 -> 0.1"),
    "loss": (
        "adamw",
        {"loss": MultiTokenLoss(weights=GeometricWeights(gamma=0.9))},
        "loss.weights.gamma 0.5 -> 0.9",
    ),
    "loss weights": (
        "adamw",
        {"loss": MultiTokenLoss(weights=UniformWeights(), z_loss=0.1)},
        "loss.weights GeometricWeights -> UniformWeights; loss.z_loss 0.0 -> 0.1",
    ),
    "longer": ("adamw", {"max_steps": 9}, "max_steps 8 -> 9"),
    "optimizer": (
        "adamw",
        {"optimizer": MUON},
        "optimizer AdamW -> MuonWithAdamW; the optimizer state of trunk, heads starts anew",
    ),
    "other optimizer": (
        "muon",
        {},
        "optimizer MuonWithAdamW -> AdamW; the optimizer state of trunk, heads starts anew",
    ),
    "freeze": ("adamw", {"freeze": ("trunk",)}, "freeze [] -> ['trunk']"),
    "unfreeze": (
        "frozen",
        {},
        "freeze ['trunk'] -> []; the optimizer state of trunk starts anew",
    ),
    "nothing": ("adamw", {}, ""),
    "nothing of Muon": ("muon", {"optimizer": MUON}, ""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_present_settings_run_and_one_line_says_what_changed(
    saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    start, options, said = CHANGES[name]
    made, steps, lines = resume(saved[start], tmp_path, caplog, **options)
    total = options.get("max_steps", 8)
    sentence = f"Resumed with other settings than the checkpoint was trained with: {said}."
    assert lines == ([sentence] if said else [])
    configured = made.configure_optimizers()
    fresh = configured["optimizer"] if isinstance(configured, dict) else configured
    bases = [group.get("initial_lr", group["lr"]) for group in fresh.param_groups]
    factors = [1.0 if made.lr_schedule is None else made.lr_schedule(step, total) for step in range(4, total)]
    assert [[group["lr"] for group in step] for step in steps] == [[base * f for base in bases] for f in factors]
    for group, found in zip(fresh.param_groups, steps[0], strict=True):
        assert {key: group.get(key) for key in found if key != "lr"} == {k: v for k, v in found.items() if k != "lr"}
    trained = sum(parameter.requires_grad for parameter in made.parameters())
    assert len(made.trainer.optimizers[0].state) == trained


def test_what_did_not_change_keeps_its_optimizer_state(saved: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    """Of a frozen run, the heads' state goes on and the trunk's begins; and the other way round."""
    for start, options, steps in (
        ("frozen", {}, {"trunk": 4, "heads": 8}),
        ("adamw", {"freeze": ("trunk",)}, {"heads": 8}),
    ):
        made, _, _ = resume(saved[start], tmp_path, caplog, **options)
        optimizer = made.trainer.optimizers[0]
        found = {
            name.split(".")[1]: int(optimizer.state[parameter]["step"])
            for name, parameter in made.named_parameters()
            if parameter in optimizer.state
        }
        assert found == steps


@pytest.mark.parametrize("size", [2, 8, 16])
def test_another_batch_size_goes_on_at_the_same_row(
    saved: dict[str, Path], tmp_path: Path, caplog: Any, size: int
) -> None:
    """16 rows were read; the next batch begins there."""
    rows, seen = data(batch_size=size), []

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
            seen.append(batch["tokens"])

    run = trainer(tmp_path, Seen(), max_steps=8, max_epochs=-1, gradient_clip_val=1.0)
    with caplog.at_level(logging.INFO):
        run.fit(module(), rows, ckpt_path=saved["adamw"], weights_only=True)
    assert any(f"batch_size 4 -> {size}" in record.getMessage() for record in caplog.records)
    assert run.global_step == 8
    single = list(data(batch_size=1).train_dataloader())
    expected = torch.cat([batch["tokens"] for batch in single[16 : 16 + size]])
    assert torch.equal(seen[0], expected)


def test_a_checkpoint_of_weights_alone_names_what_to_do(saved: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = torch.load(saved["adamw"], weights_only=True)
    for key in ("optimizer_states", "lr_schedulers"):
        del checkpoint[key]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    sentence = (
        "ckpt_path: the checkpoint holds weights without the state of their training; start a new run from them with "
        "--init_from (mtp_modules.training.init_from in a script)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        trainer(tmp_path).fit(module(), data(), ckpt_path=tmp_path / "weights.ckpt", weights_only=True)


INCOMPLETE: dict[str, Any] = {
    "loops": [{}, None, {"fit_loop": {}}],
    "optimizer_states": [[], None, [{}]],
    "lr_schedulers": [None, [1]],
    "global_step": [None, -3, "1"],
    "epoch": ["x"],
    "pytorch-lightning_version": [None],
}


def test_an_incomplete_state_of_training_is_one_sentence(saved: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = torch.load(saved["adamw"], weights_only=True)
    for name, values in INCOMPLETE.items():
        for value in values:
            with pytest.raises(InputError, match=f"^ckpt_path: the checkpoint's {name} cannot be continued from: "):
                check_resumable({**checkpoint, name: value}, loops=checkpoint["loops"]["fit_loop"])
    torch.save({**checkpoint, "loops": {"fit_loop": {}}}, tmp_path / "loops.ckpt")
    with pytest.raises(InputError, match="the checkpoint's loops cannot be continued from"):
        trainer(tmp_path).fit(module(), data(), ckpt_path=tmp_path / "loops.ckpt", weights_only=True)


def test_a_random_state_of_other_processes_is_said(saved: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    checkpoint = torch.load(saved["adamw"], weights_only=True)
    states = checkpoint["mtp_modules"]["random_states"]
    states["cpu"] = states["cpu"].repeat(3, 1)
    torch.save(checkpoint, tmp_path / "three.ckpt")
    resume(tmp_path / "three.ckpt", tmp_path, caplog)
    assert [record.getMessage() for record in caplog.records if "processes" in record.getMessage()] == [
        "Resumed on 1 processes from a checkpoint of 3: the data goes on where it was, but random numbers (dropout, "
        "sampled positions) are not those of an uninterrupted run."
    ]


def test_a_second_fit_of_a_module_begins_anew(saved: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    """What was kept of the first run's checkpoint is gone."""
    made, _, _ = resume(saved["adamw"], tmp_path, caplog)
    again = trainer(tmp_path, max_steps=2, max_epochs=-1)
    again.fit(made, data())
    assert again.global_step == 2
    assert hash_of(made)
