"""Tiny byte models, one for each format, trained through the command line for a quarter of a minute each."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    """

    heads: str
    options: Mapping[str, Any]
    trunk: Mapping[str, Any]
    model: Mapping[str, Any]
    formats: tuple[str, ...]


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
}
"""The models by name: together they are exported in every format that another program reads as it is."""


def configuration(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Return a configuration of ``fit``.

    Args:
        case: The model.
        folder: Where the run is saved.
        steps: How many steps to train.
    """
    sequential = case.heads == "SequentialHeads"
    heads = (_LAYERS if sequential else {}) | dict(case.options)
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
            "loss": {"class_path": "MultiTokenLoss", "init_args": {}},
            "tie_embeddings": False,
            **case.model,
        },
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"sources": ["stdlib"], "window": 128, "batch_size": 8, "max_eval_windows": 32},
        },
    }


def command(*words: object) -> str:
    """Run a command of the package and return what it prints.

    Args:
        words: The command and its arguments.

    Raises:
        RuntimeError: If it fails; with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mtp_modules", *map(str, words)], capture_output=True, text=True, check=False
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
    run = folder / name
    if not (run / "checkpoints" / "last.ckpt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(configuration(CASES[name], run, steps)), encoding="utf-8")  # JSON is YAML
        command("fit", "--config", file)
    return run
