"""Small float64 models and training runs whose matrices are shared out over all ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mtp_modules import (
    LinearHeads,
    MTPModel,
    MultiTokenLoss,
    ParallelHeads,
    SpeculativeDecoder,
    TransformerTrunk,
)
from mtp_modules.core import Heads
from mtp_modules.core.component import build, describe
from mtp_modules.losses import NaiveLinearCrossEntropy, RecomputeLinearCrossEntropy, TorchLinearCrossEntropy
from mtp_modules.training import (
    MTPModule,
    TeacherModel,
    WarmupDecay,
    check_same_tokens,
    clip_gradients,
    compile_blocks,
    parallelize,
    prepare_blocks,
    tensor_parallelize,
)
from mtp_modules.training.monitoring import gradient_norms
from mtp_modules.training.tensor_parallel import total_norm
from tests.distributed import runs
from tests.helpers import EVERY_HEADS, TRUNKS, WIDTH, float64, make_model, random_tokens, randomise


def parallel_heads(num_horizons: int) -> Heads:
    """Build heads with two key-value heads, which two ranks can share."""
    return ParallelHeads(
        d_model=WIDTH, num_horizons=num_horizons, num_heads=4, num_kv_heads=2, ffn_width=12, max_positions=48
    )


@dataclass(frozen=True)
class Case:
    """A model and a loss."""

    trunk: str = "transformer_grouped"
    heads: str = "parallel"
    tied: bool = True
    own_unembeddings: bool = False
    output_bias: bool = False
    documents: bool = False
    share_of_positions: float = 1.0
    distillation: float = 0.5
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def model(case: Case) -> MTPModel:
    """Build the model of a case, the same at every call."""
    with float64():
        made = MTPModel(
            trunk=TRUNKS[case.trunk](),
            heads=parallel_heads(3) if case.heads == "parallel" else EVERY_HEADS[case.heads](3),
            tie_embeddings=case.tied,
            own_unembeddings=case.own_unembeddings,
            output_bias=case.output_bias,
        )
    randomise(made)
    return made


def whole(tensor: Tensor) -> Tensor:
    """Return a gathered copy."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def score(case: Case, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Return figures and whole gradients of one batch."""
    made = model(case)
    if mesh is not None:
        tensor_parallelize(made, mesh=mesh)
    tokens = random_tokens(3, 10)
    documents = (random_tokens(3, 10, seed=1) < 2).long().cumsum(dim=1) if case.documents else None
    torch.manual_seed(0)
    loss = MultiTokenLoss(
        share_of_positions=case.share_of_positions,
        distillation=case.distillation,
        label_smoothing=case.label_smoothing,
        z_loss=case.z_loss,
    )
    terms = loss(made, tokens, document_ids=documents)
    terms.loss.backward()
    for parameter in made.parameters():
        if isinstance(parameter, DTensor):
            assert parameter.grad.placements == parameter.placements
    gradients = {name: whole(value.grad) for name, value in made.named_parameters() if value.grad is not None}
    figures = {name: value.detach() for name, value in vars(terms).items() if isinstance(value, Tensor)}
    assert gradients.keys() == dict(made.named_parameters()).keys()
    return {"figures": figures, "gradients": gradients, "norms": gradient_norms(made)}


def tensor_mesh() -> DeviceMesh:
    """Return a mesh of all ranks."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor_parallel",))


def score_shared(cases: list[Case]) -> list[dict[str, Any]]:
    """Score cases with the model shared out over all ranks."""
    mesh = tensor_mesh()
    return [score(case, mesh) for case in cases]


def decode(made: MTPModel) -> tuple[list[list[int]], Tensor]:
    """Return drafted and confirmed continuations, and the logits of a prompt."""
    prompts = random_tokens(2, 6, seed=3).tolist()
    tokens = SpeculativeDecoder().generate(made.eval(), prompts, max_new_tokens=6).tokens
    with torch.no_grad():
        return tokens, made.unembedding.logits(made(random_tokens(2, 9))[0])


def decode_shared(case: Case) -> tuple[list[list[int]], Tensor]:
    """Decode with a model that is shared out."""
    made = model(case)
    tensor_parallelize(made, mesh=tensor_mesh())
    return decode(made)


def shares(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what this rank holds of every parameter that is shared out."""
    made = model(case)
    tensor_parallelize(made, mesh=tensor_mesh())
    return {name: tuple(p.to_local().shape) for name, p in made.named_parameters() if isinstance(p, DTensor)}


def module(run: runs.Run, case: Case) -> MTPModule:
    """Build the module of a run, the same at every call."""
    made = model(case)
    description = describe(made)["init_args"]
    with float64():
        shell = MTPModule(
            trunk=build(description["trunk"]),
            heads=build(description["heads"]),
            loss=MultiTokenLoss(share_of_positions=run.share_of_positions, distillation=run.distillation),
            optimizer=runs.OPTIMIZERS[run.optimizer],
            lr_schedule=WarmupDecay(warmup_steps=2),
            tie_embeddings=case.tied,
            own_unembeddings=case.own_unembeddings,
            output_bias=case.output_bias,
            activation_checkpointing=run.activation_checkpointing,
        )
    shell.model.load_state_dict(made.state_dict())
    return shell


def trainer(run: runs.Run, data: int, tensor: int, folder: Path, *, shards: bool = False, **more: Any) -> Trainer:
    """Return a quiet trainer on one process, or as one of ``data * tensor``."""
    if data * tensor > 1:
        more["strategy"] = ModelParallelStrategy(
            data_parallel_size=data,
            tensor_parallel_size=tensor,
            save_distributed_checkpoint=shards,
            process_group_backend="gloo",
        )
    return runs.trainer(run, data * tensor, folder, **more)


def train(run: runs.Run, case: Case, data: int, tensor: int, folder: Path) -> dict[str, Tensor]:
    """Train, and return the weights."""
    made = module(run, case)
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    trainer(run, data, tensor, folder).fit(made, runs.data(run, data))
    return {name: whole(value) for name, value in made.named_parameters()}


def train_all(pairs: list[tuple[runs.Run, Case]], data: int, tensor: int, folder: Path) -> list[dict[str, Tensor]]:
    """Train several runs, one after another."""
    return [train(run, case, data, tensor, folder) for run, case in pairs]


RUN = runs.Run(optimizer="adamw", share_of_positions=1.0)


def compile_shared(cases: list[tuple[Case, str | None]]) -> list[dict[str, Tensor]]:
    """Return the gradients of shared models with compiled blocks."""
    found = []
    for case, mode in cases:
        made = model(case)
        prepare_blocks(made, activation_checkpointing=mode)
        compile_blocks((*made.trunk.blocks, *made.heads.blocks), backend="aot_eager")
        tensor_parallelize(made, mesh=tensor_mesh())
        MultiTokenLoss(distillation=case.distillation)(made, random_tokens(3, 10)).loss.backward()
        found.append({name: whole(value.grad) for name, value in made.named_parameters()})
    return found


def live(folder: Path) -> dict[str, Any]:
    """Evaluate, train, save, and go on from what one process and what shared runs have saved."""
    found: dict[str, Any] = {}
    made, rows = module(RUN, Case()), runs.data(RUN, 1)
    evaluator = trainer(RUN, 1, 2, folder, limit_val_batches=1.0)
    found["figures"], found["predicted"] = evaluator.validate(made, rows, verbose=False), evaluator.predict(made, rows)

    def fit(*, steps: int, start: Path | None = None, save: Path | None = None, shards: bool = False) -> Any:
        made = module(RUN, Case())
        fitted = trainer(RUN, 1, 2, folder, max_steps=steps, shards=shards)
        fitted.fit(made, runs.data(RUN, 1), ckpt_path=start)
        if save is not None:
            fitted.save_checkpoint(save)
        return {name: whole(value) for name, value in made.named_parameters()}

    found["one process"] = fit(steps=5, start=folder / "one.ckpt")
    fit(steps=3, save=folder / "file.ckpt")
    found["one file"] = fit(steps=5, start=folder / "file.ckpt")
    fit(steps=3, save=folder / "shards.ckpt", shards=True)
    found["shards"] = fit(steps=5, start=folder / "shards.ckpt", shards=True)
    return found


def first_values() -> dict[str, Tensor]:
    """Return the weights of a model that was built on the meta device, after ranks were seeded differently."""
    torch.manual_seed(dist.get_rank())
    with torch.device("meta"):
        made = MTPModel(trunk=TRUNKS["transformer_grouped"](), heads=parallel_heads(2))
    tensor_parallelize(made, mesh=tensor_mesh())
    assert made.unembedding.weight is made.trunk.embedding.weight
    return {name: whole(value) for name, value in made.named_parameters()}


def refusals() -> dict[str, str]:
    """Return the sentences of all that is refused."""
    mesh, said = tensor_mesh(), {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except ValueError as error:
            said[name] = str(error)

    def build_and_share(
        *, vocab_size: int = 11, num_kv_heads: int = 2, ffn_width: int = 12, qk_norm: bool = False
    ) -> None:
        trunk = TransformerTrunk(
            vocab_size=vocab_size,
            d_model=8,
            num_layers=1,
            num_heads=4,
            num_kv_heads=num_kv_heads,
            ffn_width=ffn_width,
            qk_norm=qk_norm,
        )
        tensor_parallelize(MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2)), mesh=mesh)

    note("key-value heads", lambda: build_and_share(num_kv_heads=1))
    note("inner width", lambda: build_and_share(ffn_width=9))
    note("vocabulary", lambda: build_and_share(vocab_size=1))
    note("a joint distribution", lambda: tensor_parallelize(make_model(heads="joint"), mesh=mesh))
    note("heads", lambda: tensor_parallelize(make_model(heads="parallel"), mesh=mesh))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    note("mesh", lambda: tensor_parallelize(model(Case()), mesh=both))
    more = runs.module(replace(RUN, objectives=True))
    note("objectives", lambda: parallelize(more, more.model, mesh=both))
    for backend in (NaiveLinearCrossEntropy(), RecomputeLinearCrossEntropy(), TorchLinearCrossEntropy()):
        shared = model(Case())
        tensor_parallelize(shared, mesh=mesh)
        note(type(backend).__name__, lambda s=shared, b=backend: MultiTokenLoss(backend=b)(s, random_tokens(2, 9)))
    shared.unembedding.bias = torch.nn.Parameter(torch.zeros(11, dtype=torch.float64))
    note("a whole bias", lambda: MultiTokenLoss()(shared, random_tokens(2, 9)))
    tokens = random_tokens(2, 9)
    note("other rows", lambda: check_same_tokens(random_tokens(2, 9, seed=dist.get_rank()), mesh=mesh))
    note("another order", lambda: check_same_tokens(tokens.flip(0) if dist.get_rank() else tokens, mesh=mesh))
    note("fewer rows", lambda: check_same_tokens(tokens[: 2 - dist.get_rank()], mesh=mesh))
    note("the same rows", lambda: check_same_tokens(tokens, mesh=mesh))
    compiled = module(replace(RUN, activation_checkpointing="full"), Case())
    compiled.compile_blocks = True
    note("compiling", lambda: trainer(RUN, 1, 2, Path()).fit(compiled, runs.data(RUN, 1)))
    taught = module(replace(RUN, distillation=0.0), Case())
    with TemporaryDirectory() as folder:
        taught.model.save_pretrained(folder)
        taught.teacher = TeacherModel(ckpt_path=folder)
    note("teacher", lambda: trainer(RUN, 1, 2, Path()).fit(taught, runs.data(RUN, 1)))
    note("limit", lambda: clip_gradients([], -1.0))
    return said


def norms(data: int, tensor: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the norm of known gradients that are sharded in every way, and what clipping makes of them."""
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    ways = {
        "whole": None,
        "rows": (mesh["tensor_parallel"], [Shard(0)]),
        "columns": (mesh["tensor_parallel"], [Shard(1)]),
        "replicas": (mesh["tensor_parallel"], [Replicate()]),
        "data": (mesh["data_parallel"], [Shard(0)]),
        "both": (mesh, [Shard(0), Shard(1)]),
    }
    parameters = {}
    for seed, (name, way) in enumerate(ways.items()):
        value = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parameters[name] = torch.nn.Parameter(value if way is None else distribute_tensor(value, *way))
        parameters[name].grad = parameters[name].detach().clone()
    norm = total_norm([parameter.grad for parameter in parameters.values()])
    clip_gradients(parameters.values(), 0.5)
    return norm, {name: whole(parameter.grad) for name, parameter in parameters.items()}
