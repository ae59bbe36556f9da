"""Models sharded without Lightning, looked at from inside two processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mtp_modules import MTPModel, MultiTokenLoss, ParallelHeads, TransformerTrunk
from mtp_modules.losses import FusedLinearCrossEntropy
from mtp_modules.training import Sharding, compile_blocks, prepare_blocks, shard_model
from tests.distributed.runs import weights
from tests.helpers import float64, make_model, random_tokens


class Step(nn.Module):
    """The root: its forward runs the model and the loss."""

    def __init__(self, model: MTPModel, loss: MultiTokenLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens: Tensor) -> Any:
        """Score a batch."""
        return self.loss(self.model, tokens)


def _own_matrices() -> MTPModel:
    """Build a model with an output matrix and a bias a horizon."""
    tied = make_model("transformer", "linear")
    return MTPModel(trunk=tied.trunk, heads=tied.heads, tie_embeddings=False, own_unembeddings=True, output_bias=True)


def _small(options: dict[str, Any]) -> MTPModel:
    trunk = TransformerTrunk(vocab_size=11, d_model=8, num_layers=2, num_heads=2, max_positions=16)
    return MTPModel(trunk=trunk, heads=ParallelHeads(d_model=8, num_horizons=2, num_heads=2), **options)


def gradients_of(kind: str) -> dict[str, Tensor]:
    """Return what one backward pass of a model in plain PyTorch gives every parameter, over all ranks."""
    with float64():
        torch.manual_seed(0)
        own = kind == "own matrices"
        model = _own_matrices() if own else make_model("transformer", "recurrent", tied=kind == "tied")
    step = Step(model, MultiTokenLoss(distillation=0.5))
    tokens = random_tokens(4, 9)
    if dist.is_initialized():
        torch.manual_seed(dist.get_rank())  # unlike values on the second rank must not matter
        if dist.get_rank() == 1:
            nn.init.normal_(model.trunk.embedding.weight)
        shard_model(step, model, mesh=init_device_mesh("cpu", (2,)))
        tokens = tokens[dist.get_rank() :: 2]
    step(tokens).loss.backward()
    return {name: p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for name, p in model.named_parameters()}


def units() -> list[tuple[str, int]]:
    """Return the names of the sharded units, and how many numbers of its own each rank holds of every one."""
    model = _small({})
    step = Step(model, MultiTokenLoss())
    shard_model(step, model, mesh=init_device_mesh("cpu", (2,)))
    return [
        (name, sum(p.to_local().numel() for p in unit.parameters()))
        for name, unit in step.named_modules()
        if isinstance(unit, FSDPModule)
    ]


class Seen(FusedLinearCrossEntropy):
    """Remembers in which precision it is asked to compute."""

    def __call__(
        self, states: Any, matrices: Any, sizes: Any, targets: Any, example_weights: Any, *rest: Any, **more: Any
    ) -> Any:
        """Compute."""
        self.dtypes = [tensor.dtype for tensor in (states, matrices[0].weight, example_weights)]
        return super().__call__(states, matrices, sizes, targets, example_weights, *rest, **more)


def low_precision() -> dict[str, Any]:
    """Train a step in bfloat16, and return every precision that matters, and the loss in both precisions."""
    torch.manual_seed(0)
    model, backend = _small({}), Seen()
    step = Step(model, MultiTokenLoss(backend=backend, distillation=0.5))
    tokens = random_tokens(4, 9)
    exact = step(tokens).loss.item()
    shard_model(step, model, mesh=init_device_mesh("cpu", (2,)), sharding=Sharding(param_dtype="bfloat16"))
    terms = step(tokens)
    terms.loss.backward()
    kept = {tensor.dtype for p in model.parameters() for tensor in (p, p.grad)}
    return {"computed": backend.dtypes, "kept": kept, "loss": (terms.loss.item(), exact)}


def materialized() -> dict[str, Tensor]:
    """Return the first values of a model that was built on the meta device, with other random numbers on each rank."""
    with torch.device("meta"):
        model = _small({"tie_embeddings": False})
    step = Step(model, MultiTokenLoss())
    torch.manual_seed(dist.get_rank())
    shard_model(step, model, mesh=init_device_mesh("cpu", (2,)))
    assert step(random_tokens(4, 9)).loss.isfinite()
    return weights(model)


def refused_mesh() -> str:
    """Return with which sentence a mesh of two dimensions is refused."""
    model = _small({})
    try:
        shard_model(Step(model, MultiTokenLoss()), model, mesh=init_device_mesh("cpu", (2, 1)))
    except ValueError as error:
        return str(error)
    return "not refused"


def compiled(backend: str, heads: str, mode: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return gradients of a sharded model with and without compiled blocks, and how many graphs were broken."""
    found = []
    for compile_it in (False, True):
        model = make_model("transformer", heads, seed=1)
        prepare_blocks(model, activation_checkpointing=mode)
        if compile_it:
            torch._dynamo.utils.counters.clear()
            compile_blocks((*model.trunk.blocks, *model.heads.blocks), backend=backend)
        step = Step(model, MultiTokenLoss())
        shard_model(step, model, mesh=init_device_mesh("cpu", (2,)))
        step(random_tokens(4, 9)).loss.backward()
        found.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    return found[0], found[1], sum(counters["graph_break"].values())
