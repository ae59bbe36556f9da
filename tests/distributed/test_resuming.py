"""A run goes on exactly where another stopped, sharded or not, and what a sharded run saves is enough to decode."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mtp_modules.loading import load_model
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run, data, module, resume, trainer, weights
from tests.helpers import assert_same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `one.ckpt` of one process, and `larger.ckpt` of a model with one head more."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, run in (("one", Run()), ("larger", Run(num_horizons=4, steps=1))):
        fitted = trainer(run, 1, folder)
        fitted.fit(module(run), data(run, 1))
        fitted.save_checkpoint(folder / f"{name}.ckpt")
    return folder


@pytest.fixture(scope="module")
def resumed(folder: Path) -> list[dict[str, Any]]:
    """Return the weights at which both ranks end, by what they went on from."""
    return run_ranks(resume, folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    """Return the weights at which one process ends that goes on from its own checkpoint."""
    made = module(Run())
    trainer(Run(), 1, folder, max_steps=5).fit(made, data(Run(), 1), ckpt_path=folder / "one.ckpt")
    return weights(made)


@pytest.mark.parametrize("start", ["one process", "one file", "shards"])
def test_a_sharded_run_goes_on_from(start: str, resumed: list[dict[str, Any]], expected: dict[str, Tensor]) -> None:
    for rank in resumed:
        assert_same(rank[start], expected)


def test_one_process_goes_on_from_a_sharded_run(
    folder: Path, resumed: list[dict[str, Any]], expected: dict[str, Tensor]
) -> None:
    made = module(Run())
    trainer(Run(), 1, folder, max_steps=5).fit(made, data(Run(), 1), ckpt_path=folder / "file.ckpt")
    assert_same(weights(made), expected)


def test_the_one_file_of_a_sharded_run_describes_its_model(folder: Path, resumed: list[dict[str, Any]]) -> None:
    loaded, _ = load_model(folder / "file.ckpt")
    assert {name: value.shape for name, value in loaded.named_parameters()} == {
        name: value.shape for name, value in module(Run()).model.named_parameters()
    }


def test_a_folder_of_shards_is_refused_where_it_cannot_be_read(folder: Path, resumed: list[dict[str, Any]]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^ckpt_path: .*shards\.ckpt is a folder of shards, which only a run with ModelParallelStrategy can "
        r"read; let it save one file with save_distributed_checkpoint: false\.$",
    ):
        load_model(folder / "shards.ckpt")


def test_a_larger_model_is_not_loaded_in_part(resumed: list[dict[str, Any]]) -> None:
    for rank in resumed:
        assert rank["refused"] == (
            "ckpt_path: model.heads.num_horizons is 3 here, but the checkpoint was trained with 4; "
            "take the checkpoint's value, or train a new model."
        )
