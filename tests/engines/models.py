"""Tiny byte models, one for each format, trained through the command line for a quarter of a minute each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, HEADS, POSITIONS = 128, 4, 512
_LAYERS: dict[str, Any] = {"d_model": WIDTH, "num_heads": HEADS, "ffn_width": 256, "max_positions": POSITIONS}


class Case(NamedTuple):
    """A model to train, and the format that it is exported in.

    Attributes:
        format: Name of the format.
        heads: Class of the heads.
        options: Arguments of the heads beyond the sizes.
        trunk: Arguments of the trunk beyond the sizes.
        model: Arguments of the model.
    """

    format: str
    heads: str
    options: dict[str, Any]
    trunk: dict[str, Any] = {}
    model: dict[str, Any] = {}


_SHARED = {"num_horizons": 3, "shared": True}
_QK = {"qk_norm": True}
CASES = {
    "qwen": Case("qwen", "SequentialHeads", _SHARED | _QK | {"chain_norm": True}, _QK),
    "glm": Case("glm", "SequentialHeads", _SHARED),
    "mimo": Case("mimo", "SequentialHeads", _SHARED | {"chain_norm": True, "embedding_first": False}),
    "deepseek": Case(
        "deepseek", "SequentialHeads", _SHARED | {"chain_norm": True, "num_kv_heads": 1}, {"num_kv_heads": 1}
    ),
    "medusa": Case("medusa", "ResidualHeads", {"num_horizons": 4}, {}, {"own_unembeddings": True}),
    "medusa_vllm": Case("medusa_vllm", "ResidualHeads", {"num_horizons": 4, "num_layers": 2}, _QK),
    "medusa_vllm_draft_tokens": Case(
        "medusa_vllm", "ResidualHeads", {"num_horizons": 4}, {}, {"num_draft_tokens": 64}
    ),
    "speculators": Case("speculators", "SequentialHeads", _SHARED | _QK | {"chain_norm": True}, _QK),
}
"""Every format that an engine is tried with, by the name of its case."""


def configuration(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Return a configuration of ``fit``.

    Args:
        case: The model.
        folder: Where the run is saved.
        steps: How many steps to train.
    """
    sequential = case.heads == "SequentialHeads"
    heads = (_LAYERS if sequential else {}) | case.options
    heads.pop("d_model", None)
    trunk = {"vocab_size": 256, "num_layers": 2, "embedding_std": 1.0} | _LAYERS | case.trunk
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
    if not (run / "last.ckpt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(configuration(CASES[name], run, steps)), encoding="utf-8")  # JSON is YAML
        command("fit", "--config", file)
    return run
