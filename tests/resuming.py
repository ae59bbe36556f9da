"""Runs that are stopped and continued, and hashes that say whether they end where an uninterrupted one does."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtp_modules import GeometricWeights, LinearHeads, MTPModel, MultiTokenLoss, RecurrentTrunk
from mtp_modules.data import CountsAhead, ProgressionDataModule, TokenDropout
from mtp_modules.losses import LinearWeightSchedule
from mtp_modules.training import MTPModule, MuonWithAdamW, TeacherModel, TokenThroughput, WarmupDecay

VOCAB = 24


def hash_of(module: MTPModule) -> str:
    """Return the SHA-256 of all weights and of the optimizer state by the names of parameters."""
    found = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        found.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    for name, value in sorted(module.model.state_dict().items()):
        add(name, value)
    optimizer = module.trainer.optimizers[0]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        add("lr", float(group["lr"]))
        for parameter in group["params"]:
            for key, value in sorted(optimizer.state[parameter].items()):
                add(f"{names[id(parameter)]} {key}", value)
    return found.hexdigest()


class DroppingTrunk(RecurrentTrunk):
    """A trunk with dropout on its states."""

    def forward(self, tokens: Tensor, **given: Any) -> Any:
        output = super().forward(tokens, **given)
        return output._replace(hidden=nn.functional.dropout(output.hidden, 0.3, self.training))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of which some have few tokens that count."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(row))
        return {"tokens": tokens, "loss_mask": torch.arange(9) >= row % 5}


class Stateful:
    """A loader with Lightning's stateful protocol, with or without a length, that begins anew when it is through."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = Rows()
        if self.position >= 11:
            self.position = 0
        while self.position < 11:
            start = 4 * self.position
            self.position += 1
            yield torch.utils.data.default_collate([rows[start + index] for index in range(4)])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Sized(Stateful):
    def __len__(self) -> int:
        return 11


class Generated:
    """A plain loader without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(DataLoader(Rows(), batch_size=4))


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Rows(), batch_size=4, shuffle=True),
    "generated": Generated,
    "stateful": Stateful,
    "sized": Sized,
}


def module(
    *,
    optimizer: Callable[..., Any] | None = None,
    trunk: type[RecurrentTrunk] = RecurrentTrunk,
    loss: MultiTokenLoss | None = None,
    schedule: WarmupDecay | str | None = "warmup",
    heads: int = 3,
    seed: int = 0,
    **options: Any,
) -> MTPModule:
    torch.manual_seed(seed)
    return MTPModule(
        trunk=trunk(vocab_size=VOCAB, d_model=16),
        heads=LinearHeads(d_model=16, num_horizons=heads),
        loss=loss or MultiTokenLoss(weights=GeometricWeights(gamma=0.5)),
        optimizer=optimizer or partial(torch.optim.AdamW, lr=0.02),
        lr_schedule=WarmupDecay(warmup_steps=3) if schedule == "warmup" else schedule,
        **options,
    )


def data(**options: Any) -> ProgressionDataModule:
    sizes = {"batch_size": 4, "lookahead": 3, "vocab_size": VOCAB, "length": 6}
    return ProgressionDataModule(**(sizes | {"num_train": 44, "num_val": 8, "num_test": 8} | options))


MUON = partial(MuonWithAdamW, lr=0.02, adamw_lr=0.01, weight_decay=0.1)
SAMPLED = {"loss": lambda: MultiTokenLoss(share_of_positions=0.5)}
SCHEDULED = {
    "loss": lambda: MultiTokenLoss(
        weights=LinearWeightSchedule(start=GeometricWeights(gamma=0.2), end=GeometricWeights(gamma=0.9))
    )
}


def case(module: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Any]:
    return {"module": module or {}, "data": data or {}, "trainer": trainer}


CASES: dict[str, dict[str, Any]] = {
    "sampled positions": case(SAMPLED),
    "dropout, muon, workers": case({"trunk": DroppingTrunk, "optimizer": MUON}, {"num_workers": 2}),
    "float64": case(precision="64-true"),
    "bfloat16 weights": case(SAMPLED, precision="bf16-true"),
    "bfloat16 products": case(SAMPLED, precision="bf16-mixed"),
    "augmentation": case({}, {"augmentation": TokenDropout(share=0.5), "num_workers": 2}),
    "scheduled weights": case(SCHEDULED, callbacks=[TokenThroughput]),
    "validation in between": case(SAMPLED, val_check_interval=3, limit_val_batches=2),
    "limited": case(SAMPLED, limit_train_batches=7),
    "overfitting": case(SAMPLED, overfit_batches=5),
    "overfitting, accumulated": case(SAMPLED, overfit_batches=5, accumulate_grad_batches=2),
    "accumulated": case(SAMPLED, accumulate_grad_batches=3, gradient_clip_val=0.1),
    "teacher": case({"teacher": True}),
    "epochs": case(SAMPLED, max_epochs=2, max_steps=-1),
    "shuffled loader for epochs": case(SAMPLED, {"loader": "shuffled"}, max_epochs=2, max_steps=-1),
    "sized loader for epochs": case(
        SAMPLED, {"loader": "sized"}, max_epochs=2, max_steps=-1, accumulate_grad_batches=2
    ),
    **{
        f"{name} loader by {number}{', constant rate' if constant else ''}": case(
            {**SAMPLED, **({"schedule": None} if constant else {})}, {"loader": name}, accumulate_grad_batches=number
        )
        for name in LOADERS
        for number in (2, 3)
        for constant in (False, True)
    },
}


class SaveAt(Callback):
    """Save after an optimizer step, as it ends or after a validation, and stop."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(chosen: dict[str, Any], folder: Path, start: Path | None, *, save: tuple[int, Path] | None, **more: Any) -> Any:
    """Train a case from a checkpoint; save and stop after a step if asked to; return the module."""
    options = dict(chosen["module"])
    if "loss" in options:
        options["loss"] = options["loss"]()
    if "teacher" in options:
        options["teacher"] = TeacherModel(ckpt_path=str(teacher(folder)))
    made = module(seed=0 if start is None else 1, **options)
    given = dict(chosen["data"])
    name, accumulated = given.pop("loader", None), chosen["trainer"].get("accumulate_grad_batches", 1)
    if name is None:
        loaded = {"datamodule": data(**given)}
    else:
        loader = CountsAhead(LOADERS[name](), horizons=(1, 2, 3), batches=accumulated)
        loaded = {"train_dataloaders": loader}
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "max_steps": 14 if accumulated == 1 else 8,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **{key: value for key, value in chosen["trainer"].items() if key != "callbacks"},
        **more,
    }
    callbacks = [make() for make in chosen["trainer"].get("callbacks", [])]
    callbacks += [] if save is None else [SaveAt(save[1], save[0])]
    torch.manual_seed(7 if start is None else 8)
    run = Trainer(**settings, callbacks=callbacks)
    run.fit(made, **loaded, ckpt_path=start, weights_only=True if start else None)
    return made


def teacher(folder: Path) -> Path:
    """Save a model to learn from."""
    path = folder / "teacher"
    if not path.exists():
        torch.manual_seed(5)
        trunk, heads = RecurrentTrunk(vocab_size=VOCAB, d_model=8), LinearHeads(d_model=8, num_horizons=2)
        MTPModel(trunk=trunk, heads=heads).save_pretrained(path)
    return path


def hashes(name: str, folder: Path, stops: tuple[int, ...], **more: Any) -> tuple[str, str]:
    """Return the hash of an uninterrupted run, and of one that was stopped after each of some steps."""
    whole = hash_of(fit(CASES[name], folder, None, save=None, **more))
    start: Path | None = None
    for step in stops:
        path = folder / f"{step}.ckpt"
        fit(CASES[name], folder, start, save=(step, path), **more)
        start = path
    return whole, hash_of(fit(CASES[name], folder, start, save=None, **more))
