"""Two ranks that hold one model together against one process: losses, gradients, trained weights, decoding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules.loading import load_model
from tests.distributed import tensor as work
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run, data, weights
from tests.distributed.tensor import Case
from tests.helpers import assert_same

CASES = {
    "tied": Case(),
    "untied": Case(tied=False),
    "documents": Case(documents=True),
    "positions": Case(share_of_positions=0.5),
    "own matrices and biases": Case(own_unembeddings=True, output_bias=True),
    "smoothing and z-loss": Case(label_smoothing=0.1, z_loss=0.01, tied=False),
    "a key-value head a query": Case(trunk="transformer"),
    "previous tokens": Case(trunk="transformer_previous"),
    "linear heads": Case(heads="linear"),
    "recurrent heads": Case(heads="recurrent", tied=False),
    "sequential heads": Case(heads="sequential", documents=True, share_of_positions=0.5),
    "residual heads": Case(heads="residual", own_unembeddings=True),
    "causal heads": Case(heads="causal", share_of_positions=0.5),
    "anticausal heads": Case(heads="anticausal", documents=True),
    "conditioned heads": Case(heads="conditioned", tied=False),
    "early exits": Case(heads="early_exit"),
    "EAGLE-3": Case(heads="eagle", documents=True),
    "context blocks": Case(heads="context_block", share_of_positions=0.5),
    "a transition": Case(heads="context_transition", tied=False),
    "confidence": Case(heads="confident", own_unembeddings=True, output_bias=True),
    "normalised queries and keys": Case(heads="sequential_shared", tied=False),
    "recurrent trunk": Case(trunk="gru", heads="recurrent"),
}


@pytest.fixture(scope="module")
def scores() -> list[list[dict[str, Any]]]:
    """Score all cases on two ranks."""
    return run_ranks(work.score_shared, list(CASES.values()))


@pytest.mark.parametrize("name", CASES)
def test_a_shared_model_has_the_losses_and_gradients_of_the_whole_one(
    scores: list[list[dict[str, Any]]], name: str
) -> None:
    index, wanted = list(CASES).index(name), work.score(CASES[name])
    for rank in scores:
        assert_same(rank[index], wanted)


@pytest.mark.slow
def test_compiled_blocks_of_a_shared_model_have_the_gradients_of_the_whole_one() -> None:
    cases = [(Case(), None), (Case(tied=False), "selective"), (Case(heads="sequential_shared"), None)]
    for rank in run_ranks(work.compile_shared, cases, timeout=170):
        for found, (case, _) in zip(rank, cases, strict=True):
            assert_same(found, work.score(case)["gradients"])


def test_each_rank_holds_its_share() -> None:
    first, second = run_ranks(work.shares, Case(tied=False, output_bias=True))
    assert first["unembedding.weight"] == (6, 8)
    assert second["unembedding.weight"] == (5, 8)
    assert second["unembedding.bias"] == (5,)
    assert first["trunk.embedding.weight"] == (6, 8)
    assert first["trunk.layers.0.attention.qkv.weight"] == (8, 8)
    assert first["trunk.layers.0.attention.out.weight"] == (8, 4)
    assert first["heads.layers.2.ffn.gate_up.weight"] == (12, 8)
    assert second["heads.layers.2.ffn.down.weight"] == (8, 6)


def test_a_shared_model_decodes_as_the_whole_one_does() -> None:
    wanted = work.decode(work.model(Case()))
    for found in run_ranks(work.decode_shared, Case(), timeout=150):
        assert found[0] == wanted[0]
        assert_same(found[1], wanted[1])


RUNS = {
    "unequal counts": (Run(optimizer="adamw", unequal_counts=True), Case(output_bias=True)),
    "AdamW": (Run(optimizer="adamw"), Case()),
    "Muon": (Run(), Case(tied=False)),
    "random positions": (Run(optimizer="adamw", share_of_positions=0.5), Case()),
    "clipping by value, recomputing": (
        Run(optimizer="adamw", clip=0.01, clip_algorithm="value", activation_checkpointing="selective"),
        Case(heads="recurrent"),
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, torch.Tensor]]]:
    """Train all runs on two ranks."""
    return run_ranks(work.train_all, list(RUNS.values()), 1, 2, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", RUNS)
def test_a_shared_model_trains_as_the_whole_one_does(
    trained: list[list[dict[str, torch.Tensor]]], name: str, tmp_path: Path
) -> None:
    run, case = RUNS[name]
    wanted = work.train(run, case, 1, 1, tmp_path)
    before = dict(work.module(run, case).named_parameters())
    assert all(not value.equal(before[key]) for key, value in wanted.items())
    for rank in trained:
        assert_same(rank[list(RUNS).index(name)], wanted)


def test_sharding_and_sharing_out_go_together(tmp_path: Path) -> None:
    pairs = [(Run(unequal_counts=True), Case(tied=False)), (Run(optimizer="adamw"), Case(heads="recurrent"))]
    wanted = [work.train(*pair, 1, 1, tmp_path) for pair in pairs]
    for found in run_ranks(work.train_all, pairs, 2, 2, tmp_path, world_size=4, timeout=150):
        assert_same(found, wanted)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2)])
def test_every_number_counts_once_in_the_norm_however_gradients_are_sharded(sizes: tuple[int, int]) -> None:
    gradients = {
        name: torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, name in enumerate(("whole", "rows", "columns", "replicas", "data", "both"))
    }
    parameters = {name: torch.nn.Parameter(value) for name, value in gradients.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
    wanted = (norm, {name: parameter.grad for name, parameter in parameters.items()})
    for found in run_ranks(work.norms, *sizes, world_size=sizes[0] * sizes[1]):
        assert_same(found, wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `one.ckpt` of one process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    fitted = work.trainer(work.RUN, 1, 1, folder)
    fitted.fit(work.module(work.RUN, Case()), data(work.RUN, 1))
    fitted.save_checkpoint(folder / "one.ckpt")
    return folder


@pytest.fixture(scope="module")
def lives(folder: Path) -> list[dict[str, Any]]:
    """Return what both ranks find, save and go on from."""
    return run_ranks(work.live, folder, timeout=150)


@pytest.mark.parametrize("start", ["one process", "one file", "shards"])
def test_a_shared_run_goes_on_from(start: str, folder: Path, lives: list[dict[str, Any]], tmp_path: Path) -> None:
    made = work.module(work.RUN, Case())
    work.trainer(work.RUN, 1, 1, tmp_path, max_steps=5).fit(made, data(work.RUN, 1), ckpt_path=folder / "one.ckpt")
    for rank in lives:
        assert_same(rank[start], weights(made))


def test_one_process_goes_on_from_a_shared_run_and_decodes_it(
    folder: Path, lives: list[dict[str, Any]], tmp_path: Path
) -> None:
    made = work.module(work.RUN, Case())
    work.trainer(work.RUN, 1, 1, tmp_path, max_steps=5).fit(made, data(work.RUN, 1), ckpt_path=folder / "file.ckpt")
    assert_same(weights(made), lives[0]["one file"])
    shared, alone = (load_model(folder / name)[0].double() for name in ("file.ckpt", "one.ckpt"))
    assert work.decode(shared)[0] == work.decode(alone)[0]


def test_a_shared_model_finds_and_predicts_what_the_whole_one_does(lives: list[dict[str, Any]], tmp_path: Path) -> None:
    made, rows = work.module(work.RUN, Case()), data(work.RUN, 1)
    evaluator = work.trainer(work.RUN, 1, 1, tmp_path, limit_val_batches=1.0)
    (figures,), predicted = evaluator.validate(made, rows, verbose=False), evaluator.predict(made, rows)
    for rank in lives:
        assert rank["figures"] == [pytest.approx(figures, rel=1e-6)]
        assert_same(rank["predicted"], predicted)


def test_a_model_on_the_meta_device_gets_the_same_first_values_everywhere() -> None:
    first, second = run_ranks(work.first_values)
    assert_same(first, second, tolerance=0.0)
    assert first["trunk.embedding.weight"].std() == pytest.approx(0.02, rel=0.5)
    assert first["trunk.layers.0.attention.qkv.weight"].std() == pytest.approx(8**-0.5, rel=0.3)
    assert first["trunk.layers.0.attention_norm.weight"].eq(1).all()


WHOLE_ONLY = (
    "{}: the output matrix is sharded over the vocabulary by tensor parallelism, and this backend needs it whole; "
    "take FusedLinearCrossEntropy."
)


OTHER_ROWS = (
    "train_dataloader: gives the 2 processes of a tensor-parallel group different batches; let it divide its rows by "
    "trainer.distributed_sampler_kwargs, as the data modules of mtp_modules do."
)


def test_what_cannot_be_shared_out_is_refused() -> None:
    backends = ("NaiveLinearCrossEntropy", "RecomputeLinearCrossEntropy", "TorchLinearCrossEntropy")
    for found in run_ranks(work.refusals):
        assert found == {name: WHOLE_ONLY.format(name) for name in backends} | {
            **dict.fromkeys(("other rows", "another order", "fewer rows"), OTHER_ROWS),
            "key-value heads": "TransformerTrunk: num_kv_heads (1) must be a multiple of tensor_parallel_size (2).",
            "heads": "ParallelHeads: num_kv_heads (1) must be a multiple of tensor_parallel_size (2).",
            "a joint distribution": (
                "JointHeads: the mixture of a joint distribution needs whole logits, which no process of a "
                "tensor-parallel group has; set tensor_parallel_size to 1."
            ),
            "inner width": (
                "TransformerTrunk: ffn_width (9) is laid out in 1 blocks, which tensor_parallel_size (2) does not "
                "divide; make ffn_width a multiple of 8 and tensor_parallel_size 1, 2, 4 or 8."
            ),
            "vocabulary": (
                "TransformerTrunk: vocab_size (1) leaves one of 2 processes without a token; "
                "lower tensor_parallel_size."
            ),
            "objectives": "model.objectives: do not go with tensor parallelism; set tensor_parallel_size to 1.",
            "mesh": "tensor_parallelize: mesh must have one dimension, got 2; pass the tensor-parallel one.",
            "a whole bias": (
                "LinearCrossEntropy: output matrices and biases must all be whole, or all be sharded by rows over the "
                "same processes (Shard(0) on a mesh of one dimension); tensor_parallelize does that."
            ),
            "compiling": (
                "activation_checkpointing: full does not go with compile_blocks under tensor parallelism: torch's "
                "compiler fails in the first step; take selective, or leave compile_blocks out."
            ),
            "teacher": (
                "TeacherModel: tensor_parallel_size is 2, but the teacher's output matrix is whole and cannot be "
                "compared with a sharded one; set tensor_parallel_size to 1, or leave teacher out."
            ),
            "limit": "clip_gradients: limit must be at least 0, got -1.0.",
        }
