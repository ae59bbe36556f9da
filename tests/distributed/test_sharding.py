"""FSDP2 in plain PyTorch: what is sharded, in which precision, and that gradients are those of one process."""

import pytest
import torch

from tests.distributed import sharding
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same


@pytest.mark.parametrize("kind", ["tied", "untied", "own matrices"])
def test_gradients_are_those_of_one_process(kind: str) -> None:
    expected = sharding.gradients_of(kind)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for found in run_ranks(sharding.gradients_of, kind):
        assert_same(found, expected)


def test_blocks_heads_and_ends_are_units_of_their_own() -> None:
    first, second = run_ranks(sharding.units)
    assert [name for name, _ in first] == [
        "",
        "model.trunk.embedding",
        *(f"model.trunk.layers.{index}" for index in (0, 1)),
        "model.heads",
        *(f"model.heads.layers.{index}" for index in (0, 1)),
        "model.unembedding",
    ]
    for (name, mine), (_, others) in zip(first, second, strict=True):
        assert abs(mine - others) <= 16, f"{name} must be shared out evenly"  # one row of a matrix


def test_blocks_compute_in_bfloat16_and_everything_that_is_kept_is_float32() -> None:
    for found in run_ranks(sharding.low_precision):
        states, matrix, weights = found["computed"]
        assert (states, matrix, weights) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert found["kept"] == {torch.float32}
        loss, exact = found["loss"]
        assert loss == pytest.approx(exact, rel=0.02)
        assert loss != exact


def test_a_model_from_the_meta_device_is_the_same_on_all_ranks() -> None:
    first, second = run_ranks(sharding.materialized)
    assert_same(first, second, tolerance=0)
    assert float(first["unembedding.weight"].std()) == pytest.approx(8**-0.5, rel=0.3)
    assert all(bool((values == 1).all()) for name, values in first.items() if "norm" in name)


def test_a_mesh_of_two_dimensions_is_refused() -> None:
    for said in run_ranks(sharding.refused_mesh):
        assert said == "shard_model: mesh must have one dimension, got 2; pass the data-parallel one."


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("backend", "mode"), [("aot_eager", "full"), ("inductor", None), ("inductor", "selective")])
def test_compiled_blocks_give_the_same_gradients(backend: str, mode: str | None) -> None:
    for plain, compiled, breaks in run_ranks(sharding.compiled, backend, "parallel", mode, timeout=500):
        assert_same(compiled, plain)
        assert breaks == 0


def test_traced_blocks_give_the_same_gradients() -> None:
    for plain, traced, breaks in run_ranks(sharding.compiled, "eager", "linear", None):
        assert_same(traced, plain)
        assert breaks == 0
