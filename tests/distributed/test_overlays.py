"""Every overlay goes on top of a configuration and runs, and what it leaves can be decoded."""

from pathlib import Path
from typing import Any

import pytest

from mtp_modules.commands.generate import generate
from mtp_modules.training import MTPModule
from tests.command_line import CONFIGS, ROOT, refusal, run
from tests.distributed import command_line
from tests.distributed.ranks import run_ranks

OVERLAYS = ROOT / "configs" / "overlays"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TINY = [
    *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accumulate_grad_batches=2"),
    *("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.num_sanity_val_steps=1"),
    *("--model.trunk.init_args.d_model=16", "--model.trunk.init_args.num_layers=1"),
    *("--data.init_args.window=24", "--data.init_args.batch_size=2"),
    f"--data.init_args.sources=[{ROOT / 'mtp_modules' / 'core'}]",
    *("--data.init_args.val_share=0.3", "--data.init_args.test_share=0.3"),
]


def arguments(overlay: str, folder: Path, *more: str) -> list[str | Path]:
    configs = ["fit", "--config", QUICKSTART, "--config", OVERLAYS / f"{overlay}.yaml"]
    return [*configs, *TINY, f"--trainer.default_root_dir={folder}", *more]


ON_META = "--model.sharding.init_args.init_on_meta=true"
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "ddp": ("ddp", [], {"built on": {"cpu"}, "sharded": False, "policy": None, "steps": 2}),
    "fsdp2": ("fsdp2", [], {"built on": {"cpu"}, "sharded": True, "policy": "bfloat16", "steps": 2}),
    "meta": ("fsdp2", [ON_META], {"built on": {"meta"}, "sharded": True, "policy": "bfloat16", "steps": 2}),
    "fsdp2 and tensor parallel": (
        "fsdp2",
        [
            *("--trainer.strategy.init_args.tensor_parallel_size=2", "--model.trunk.init_args.num_kv_heads=2"),
            ON_META,
        ],
        {"built on": {"meta"}, "sharded": True, "policy": "bfloat16", "steps": 2},
    ),
    "tensor parallel": (
        "tensor_parallel",
        ["--model.trunk.init_args.num_kv_heads=2"],
        {"built on": {"cpu"}, "sharded": False, "policy": None, "steps": 2},
    ),
}
NIGHTLY = {"fsdp2", "fsdp2 and tensor parallel"}
"""The others show what these do, each in another place."""


@pytest.mark.parametrize(
    ("overlay", "more", "expected"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.nightly if name in NIGHTLY else ())
        for name, case in CASES.items()
    ],
)
def test_two_processes_train_and_the_checkpoint_decodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overlay: str, more: list[str], expected: dict[str, Any]
) -> None:
    given = arguments(overlay, tmp_path, "--trainer.devices=2", *more)
    assert run_ranks(command_line.fit, given) == [expected, expected]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    generate(str(tmp_path), max_new_tokens=4)
    assert capsys.readouterr().out.startswith("def ")


@pytest.mark.parametrize(
    ("overlay", "readings"), [("ddp", [False]), pytest.param("fsdp2", [True, True], marks=pytest.mark.slow)]
)
def test_a_resumed_run_reads_the_weights_of_its_checkpoint_once(
    tmp_path: Path, overlay: str, readings: list[bool]
) -> None:
    """Each process; a strategy that reads the file itself maps it, and so does the look at its description."""
    first = arguments(overlay, tmp_path / "first", "--trainer.devices=2")
    run_ranks(command_line.fit, first)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    more = ("--trainer.devices=2", "--trainer.max_steps=4", "--ckpt_path", last)
    second = arguments(overlay, tmp_path / "second", *more)
    assert run_ranks(command_line.resume, second) == [(4, readings)] * 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Anomaly Detection")
def test_debugging_ends_after_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(MTPModule, "on_fit_end", lambda self: steps.append(self.trainer.global_step))
    run(*arguments("debug", tmp_path, "--trainer.max_steps=9", "--trainer.accumulate_grad_batches=1"))
    assert steps == [2]
    assert not (tmp_path / "config.yaml").exists()


def test_there_is_a_test_for_every_overlay() -> None:
    assert {path.stem for path in OVERLAYS.iterdir()} == {"ddp", "fsdp2", "tensor_parallel", "debug"}
    assert OVERLAYS / "ddp.yaml" not in CONFIGS, "an overlay is no run"


def test_what_cannot_be_right_is_refused_before_any_work(tmp_path: Path) -> None:
    def sentence(*more: str) -> str:
        return refusal("fit", "--config", QUICKSTART, *TINY, f"--trainer.default_root_dir={tmp_path}", *more)

    assert sentence("--trainer.strategy=fsdp").startswith("trainer.strategy: is Lightning's FSDPStrategy")
    assert sentence(
        "--trainer.strategy=DDPStrategy", "--trainer.strategy.static_graph=true", "--trainer.devices=1"
    ).startswith("trainer.strategy: DDPStrategy with static_graph: true does not go with accumulate_grad_batches=2")
    unknown = "model.sharding: unknown class 'Shading'; did you mean Sharding? Known: Sharding."
    assert sentence("--model.sharding=Shading").startswith(unknown)
    assert sentence("--model.activation_checkpointing=some") == (
        "activation_checkpointing: must be one of full, selective, got 'some'."
    )
