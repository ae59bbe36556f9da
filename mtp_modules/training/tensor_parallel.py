"""Shard the matrices of a model over processes that work on the same batch (tensor parallelism).

Shoeybi et al. 2019 (arXiv 1909.08053). Every process holds whole groups of attention heads, a part of the feed-forward
layers' inner width and a part of the vocabulary, and computes a partial output of each layer; an all-reduce adds them.
Sharded matrices are ``DTensor`` objects, so checkpoints hold whole matrices; activations are plain tensors, the same on
all processes.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import at_least, divides, refuse
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.heads import JointHeads
from mtp_modules.layers.transformer import RMSNorm, TransformerLayer
from mtp_modules.model import MTPModel
from mtp_modules.training.optimizers import local
from mtp_modules.training.parallel import Sharding, device_of, make_ready, shard_model

_LAYER_PLAN = {
    "attention.qkv": ColwiseParallel(),
    "attention.out": RowwiseParallel(),
    "ffn.gate_up": ColwiseParallel(),
    "ffn.down": RowwiseParallel(),
}


def parallelize(root: nn.Module, model: MTPModel, *, mesh: DeviceMesh, sharding: Sharding | None = None) -> None:
    """Apply tensor parallelism and FSDP2 to a model in place, by the dimensions of a mesh.

    Args:
        root: Holds the model; see :func:`~mtp_modules.training.shard_model`.
        model: Changed in place.
        mesh: Dimensions ``data_parallel`` and ``tensor_parallel``, as Lightning's ``ModelParallelStrategy`` makes it.
        sharding: How FSDP2 shards it over the first. If ``None`` and only the second is above 1, FSDP2 is not used.

    Raises:
        ValueError: If there are auxiliary objectives with tensor parallelism; see also :func:`tensor_parallelize` and
            :func:`~mtp_modules.training.shard_model`.
    """
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if tensor.size() > 1:
        if len(getattr(root, "objectives", ())):
            refuse("model.objectives", "do not go with tensor parallelism; set tensor_parallel_size to 1.")
        tensor_parallelize(model, mesh=tensor)
    if data.size() > 1 or tensor.size() == 1 or sharding is not None:
        shard_model(root, model, mesh=data, sharding=sharding)


def tensor_parallelize(model: MTPModel, *, mesh: DeviceMesh) -> None:
    """Shard the matrices of a model in place over the processes of a mesh, which must read the same batches.

    Transformer layers of trunk and heads, the embedding and the output matrices are sharded; everything else (norms,
    recurrent nets, heads without layers, tables of previous tokens) is replicated. The loss must be computed by
    :class:`~mtp_modules.losses.FusedLinearCrossEntropy`, which never gathers logits. The random numbers of training
    must be the same on all processes; see :func:`share_random_state`.

    A model that was built on the meta device is allocated and initialised here, one layer at a time. Values are those
    of the mesh's first process.

    Args:
        model: Changed in place, before it is sharded by FSDP2, if it is.
        mesh: One dimension, the processes that hold the model together.

    Raises:
        ValueError: If the mesh has more than one dimension, sizes of the model are not divisible by its processes, or
            the heads have a joint distribution.
    """
    if mesh.ndim != 1:
        refuse("tensor_parallelize", f"mesh must have one dimension, got {mesh.ndim}; pass the tensor-parallel one.")
    if isinstance(model.heads, JointHeads):
        refuse(
            model.heads,
            "the mixture of a joint distribution needs whole logits, which no process of a tensor-parallel group has; "
            "set tensor_parallel_size to 1.",
        )
    _check_sizes(model, mesh.size())
    layers = _layers(model.trunk) + _layers(model.heads)
    device = device_of(mesh)
    for layer in layers:
        make_ready(layer, device, mesh, ())
        parallelize_module(layer, mesh, _LAYER_PLAN, src_data_rank=None)
        layer.attention.local_kv_heads = layer.attention.num_kv_heads // mesh.size()
        for norm in (layer.attention.query_norm, layer.attention.key_norm):
            if norm is not None:  # its gains serve the heads of all processes
                norm.forward = partial(_normalise, norm, mesh.get_group())  # type: ignore[method-assign]
    make_ready(model, device, mesh, layers)
    embedding = model.trunk.embedding
    if isinstance(embedding, nn.Embedding):
        embedding.weight = _by_rows(embedding.weight, mesh)
        embedding.forward = partial(_embed, embedding)  # type: ignore[method-assign]
    _shard_unembedding(model.unembedding, embedding, mesh)


def _layers(module: nn.Module) -> list[TransformerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, TransformerLayer)]


def _check_sizes(model: MTPModel, size: int) -> None:
    """Reject sizes that are not divisible by the number of processes."""
    for part in (model.trunk, model.heads):
        for layer in _layers(part):
            divides(part, "tensor_parallel_size", size, "num_kv_heads", layer.attention.num_kv_heads)
            if layer.ffn.num_blocks % size:
                refuse(
                    part,
                    f"ffn_width ({layer.ffn.down.in_features}) is laid out in {layer.ffn.num_blocks} blocks, which "
                    f"tensor_parallel_size ({size}) does not divide; make ffn_width a multiple of 8 and "
                    "tensor_parallel_size 1, 2, 4 or 8.",
                )
    vocab_size = model.trunk.vocab_size
    if (size - 1) * -(-vocab_size // size) >= vocab_size:
        refuse(
            model.trunk,
            f"vocab_size ({vocab_size}) leaves one of {size} processes without a token; lower tensor_parallel_size.",
        )


def _by_rows(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """Return this process's part of the vocabulary."""
    part = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _embed(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    """Look up the tokens in this process's shard, and all-reduce the result.

    Torch's ``RowwiseParallel`` does the same, but computes the gradient of the whole vocabulary on every process.
    """
    weight = embedding.weight
    assert isinstance(weight, DTensor)
    mesh, rows = weight.device_mesh, weight.to_local()
    place = tokens - mesh.get_local_rank() * -(-embedding.num_embeddings // mesh.size())
    held = (place >= 0) & (place < len(rows))
    found = F.embedding(place.where(held, 0), rows) * held[..., None]
    added: Tensor = _Sum.apply(found, mesh.get_group())  # type: ignore[no-untyped-call]
    return added


def _normalise(norm: RMSNorm, group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """Normalise some of the heads; the gradient of the gains is summed over all of them."""
    weight: Tensor = _Shared.apply(norm.weight, group)  # type: ignore[no-untyped-call]
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), norm.eps)


class _Shared(torch.autograd.Function):
    """The same parameter on every process; gradients are all-reduced by addition."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the parameter."""
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """Return the sum of all gradients."""
        total = outer[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """All-reduce by addition; the gradient is the same on every process."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum."""
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it is."""
        return outer[0], None


def _shard_unembedding(unembedding: Unembedding, embedding: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every output matrix and bias by rows; a tied matrix is sharded already."""
    if unembedding.draft_tokens is not None:
        refuse(
            "tensor_parallelize",
            f"horizons beyond the first score {len(unembedding.draft_tokens)} tokens of their own, which are not "
            "sharded; leave num_draft_tokens out, or train without tensor parallelism.",
        )
    if unembedding.tied:
        assert isinstance(embedding, nn.Embedding)
        unembedding.weight = embedding.weight
    else:
        unembedding.weight = _by_rows(unembedding.weight, mesh)
    if unembedding.bias is not None:
        unembedding.bias = _by_rows(unembedding.bias, mesh)
    if unembedding.transition is not None:
        unembedding.transition = _by_rows(unembedding.transition, mesh)
    for parameters in (unembedding.own_weights, unembedding.own_biases):
        for index, parameter in enumerate(parameters):
            parameters[index] = _by_rows(parameter, mesh)


def clip_gradients(parameters: Iterable[Tensor], limit: float, *, by_value: bool = False) -> None:
    """Clip gradients of which some are replicated and others are sharded, over one mesh or several.

    ``torch.nn.utils.clip_grad_norm_`` does not support such a mixture.

    Args:
        parameters: Those without a gradient are left out.
        limit: Largest norm of all gradients together, or largest absolute value.
        by_value: Clip by value instead of by norm.

    Raises:
        ValueError: If ``limit`` is negative.
    """
    at_least("clip_gradients", "limit", limit, 0)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if by_value:
        for gradient in gradients:
            local(gradient).clamp_(-limit, limit)
    elif gradients:
        factor = (limit / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            part = local(gradient)
            part.mul_(factor.to(part.dtype))


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, each number counted once.

    Args:
        gradients: Whole or sharded, in the same order on every process.
    """
    sums: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(gradient, DTensor):
            mesh, placements = gradient.device_mesh, gradient.placements
            dims = (dim for dim, placement in enumerate(placements) if not placement.is_replicate())
            groups = tuple(mesh.get_group(dim) for dim in dims)
        part = local(gradient)
        sums[groups].append(torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32)))
    squares = []
    for groups, norms in sums.items():
        square = torch.stack(norms).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def check_same_tokens(tokens: Int[Tensor, "B L"], *, mesh: DeviceMesh) -> None:
    """Raise an error if the processes of a tensor-parallel group have different batches: gradients would be wrong.

    Args:
        tokens: Of this process.
        mesh: One dimension, the tensor-parallel group.

    Raises:
        ValueError: If processes have different tokens.
    """
    # A hash, which overflows on purpose: tokens of different shapes could not be gathered and compared.
    places = torch.arange(1, tokens.numel() + 1, device=tokens.device)
    mine = torch.stack((places.numel() * torch.ones_like(tokens[0, 0]), ((tokens.flatten() + 7) * places**3).sum()))
    gathered = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(gathered, mine, group=mesh.get_group())
    if any(not other.equal(mine) for other in gathered):
        refuse(
            "train_dataloader",
            f"gives the {mesh.size()} processes of a tensor-parallel group different batches; let it divide its rows "
            "by trainer.distributed_sampler_kwargs, as the data modules of mtp_modules do.",
        )


def share_random_state(generator: torch.Generator, *, mesh: DeviceMesh) -> None:
    """Broadcast the random state of the mesh's first process, so that all sample the same positions.

    Args:
        generator: Changed in place.
        mesh: One dimension, the tensor-parallel group.
    """
    state = generator.get_state().to(mesh.device_type)
    dist.broadcast(state, group=mesh.get_group(), group_src=0)
    generator.set_state(state.cpu())
