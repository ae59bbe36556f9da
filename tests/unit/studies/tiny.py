"""A study that takes seconds, and results that were never trained."""

import copy
from pathlib import Path
from typing import Any

import yaml

from mtp_modules.core import Trunk
from mtp_modules.loading import load_model
from mtp_modules.studies import Decode, Outcome, Study, Sweep

BASE: dict[str, Any] = {
    "model": {
        "trunk": {"class_path": "RecurrentTrunk", "init_args": {"vocab_size": 24, "d_model": 16, "cell": "rnn"}},
        "heads": {"class_path": "LinearHeads", "init_args": {"num_horizons": 2}},
        "loss": {"class_path": "MultiTokenLoss"},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.02}},
    },
    "data": {
        "class_path": "ProgressionDataModule",
        "init_args": {"length": 6, "max_lookahead": 2, "num_train": 64, "num_val": 16, "num_test": 16, "batch_size": 8},
    },
    "trainer": {"gradient_clip_val": 1.0},
}
STUDY: dict[str, Any] = {
    "question": "Are two heads < better than one?",
    "claim": "They are & <b>always</b>.",
    "base": BASE,
    "arms": {"N = {num_horizons}": {"model.heads.init_args.num_horizons": {"each": [1, 2]}}},
    "steps": 8,
    "points": 2,
    "seeds": 2,
    "decode": {"prompts": 4, "prompt_length": 2, "distances": 3, "new_tokens": 4},
    "figures": [{"kind": "curves"}, {"kind": "bars"}, {"kind": "heat_map"}, {"kind": "distance", "log_error": True}],
    "tables": [{"kind": "results", "columns": ["loss/head_1", "accuracy/head_2", "decode/speedup"]}],
    "verdicts": [{"kind": "difference", "key": "accuracy/head_1"}],
}


def trained_trunk(ckpt_path: str) -> Trunk:
    """Return the trunk of a checkpoint, as an arm with a helper would use it."""
    return load_model(ckpt_path)[0].trunk


def content(**changes: Any) -> dict[str, Any]:
    """Return the study with other values at its top level."""
    return copy.deepcopy(STUDY | changes)


def written(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """Write the study, and return the path of its YAML."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content(**changes), sort_keys=False), encoding="utf-8")
    return path


def study(**changes: Any) -> Study:
    """Return the study as an object."""
    given = content(**changes)
    given["decode"] = Decode(**given["decode"]) if given["decode"] else None
    if given.get("sweep"):
        given["sweep"] = Sweep(**given["sweep"])
    return Study(**given, name="tiny")


def outcome(finals: dict[str, list[list[dict[str, float]]]], **changes: Any) -> Outcome:
    """Return results that are what the test says: figures by arm, value of the sweep and seed."""
    asked = study(arms={arm: {} for arm in finals}, **changes)
    results = []
    for arm, by_value in finals.items():
        for value, seeds in zip(asked.sweep_values, by_value, strict=True):
            for seed, figures in enumerate(seeds, start=1):
                points = [
                    {
                        "steps": step,
                        "examples": 8 * step,
                        "tokens": 48 * step,
                        "flops": 1000 * step,
                        "seconds": 0.1 * step,
                    }
                    | {"figures": {key: x + (2 - step) for key, x in figures.items()}}
                    for step in (1, 2)
                ]
                heads = sum(key.startswith("loss/head_") for key in figures)
                results.append(
                    {
                        "arm": arm,
                        "value": value,
                        "seed": seed,
                        "final": figures,
                        "tests": {"other": {key: 2 * x for key, x in figures.items()}},
                        "curve": points,
                        "positions": [[seed / 4, None][:heads], [0.5, 0.25][:heads]],
                        "settings": BASE,
                        "machine": {"processor": "abacus"},
                        "versions": {"python": "3"},
                    }
                )
    return Outcome(asked, results, [], {"seeds": 2, "minutes": None, "scale": 1.0, "workers": 1})
