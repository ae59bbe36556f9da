"""Linear + cross-entropy on matrices that are sharded over the vocabulary, one part a rank, and whole."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.losses import FusedLinearCrossEntropy, NaiveLinearCrossEntropy

WIDTH = 5


@dataclass(frozen=True)
class Example:
    """Three heads, of which the last two have a teacher if there is one."""

    vocab_size: int = 11
    sizes: tuple[int, ...] = (20, 9, 9)
    own: bool = False
    detach_far: bool = False
    bias: bool = False
    teacher: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    rows_per_chunk: int | None = 7
    ignored: float = 0.2
    scale: float = 2.0
    ties: bool = False
    banned: tuple[int, ...] = ()
    seed: int = 0


def draw(example: Example) -> tuple[list[Tensor], Tensor, Tensor, Teacher | None]:
    """Return states and distinct matrices (each with its bias), targets, weights and teacher."""
    generator = torch.Generator().manual_seed(example.seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.round() if example.ties else values

    number, taught = sum(example.sizes), sum(example.sizes[1:])
    leaves = [normal(number, WIDTH)]
    for _ in example.sizes if example.own else example.sizes[:1]:
        leaves.append(example.scale * normal(example.vocab_size, WIDTH))
        if example.bias:
            leaves.append(normal(example.vocab_size))
            leaves[-1][list(example.banned)] = -torch.inf
    targets = torch.randint(example.vocab_size, (number,), generator=generator)
    targets[torch.rand(number, generator=generator) < example.ignored] = -1
    weights = normal(number).abs()
    for token in example.banned:  # the loss of such a target is infinite: it counts only with weight 0
        weights[targets == token] = 0.0
    share = torch.rand(taught, generator=generator, dtype=torch.float64)
    return leaves, targets, weights, Teacher(normal(taught, WIDTH), share) if example.teacher else None


def score(backend: LinearCrossEntropy, example: Example, mesh: Any = None) -> dict[str, Any]:
    """Return the terms and the whole gradients of states, matrices and biases."""
    leaves, targets, weights, teacher = draw(example)
    states = leaves[0].requires_grad_()
    ends = [leaf if mesh is None else distribute_tensor(leaf, mesh, [Shard(0)]) for leaf in leaves[1:]]
    for end in ends:
        end.requires_grad_()
    step = 2 if example.bias else 1
    matrices = [OutputMatrix(*ends[at : at + step]) for at in range(0, len(ends), step)]
    if not example.own:
        far = OutputMatrix(*(end.detach() for end in ends)) if example.detach_far else matrices[0]
        matrices += [far] * (len(example.sizes) - 1)
    options = {"label_smoothing": example.label_smoothing, "z_loss": example.z_loss}
    terms: CrossEntropyTerms = backend(states, matrices, example.sizes, targets, weights, teacher, **options)
    (1.7 * terms.loss).backward()
    gradients = [leaf.grad for leaf in (states, *ends)]
    found = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients]
    return {"terms": [term.detach() for term in terms if term is not None], "gradients": found}


def sharded(examples: list[Example]) -> list[dict[str, Any]]:
    """Score examples with the matrices sharded over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor_parallel",))
    return [score(FusedLinearCrossEntropy(rows_per_chunk=e.rows_per_chunk), e, mesh) for e in examples]


def whole(example: Example) -> dict[str, Any]:
    """Score an example with all logits at hand."""
    return score(NaiveLinearCrossEntropy(), example)
