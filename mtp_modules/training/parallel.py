"""Shard a model over processes with FSDP2. Plain functions, usable without Lightning.

Every block of trunk and heads is a separate FSDP unit: its parameters are gathered right before its forward pass and
freed right after. The rest of the heads is a unit, and so are embedding and unembedding, together if they are tied. All
else belongs to the root, the module whose forward runs both the model and the loss, because the loss uses the
unembedding after the model's own forward has returned.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Tensor
from mtp_modules.model import MTPModel
from mtp_modules.training.optimizers import local

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Sharding(Component):
    """How FSDP2 shards a model (Zhao et al. 2023, arXiv 2304.11277).

    Weights, gradients and optimizer state are kept in the precision that the model was built in (the trainer's
    ``precision: 32-true``). ``param_dtype`` is the precision that a unit computes in.

    Args:
        param_dtype: ``"bfloat16"``, or another precision to gather weights and compute in; that of the model if
            ``None``. float16 would need a gradient scaler, and is rejected.
        reduce_dtype: Precision in which gradients are added up over processes, where ``param_dtype`` is set.
        reshard_after_forward: Free a unit's weights after its forward pass and gather them again for its backward pass.
            False keeps them in between: faster, and more memory.
        init_on_meta: Let the command line build the model on the meta device and initialise it after sharding, so that
            no process ever holds all of it. Not for parts that load trained weights when they are built.

    Raises:
        ValueError: If a precision is unknown.
    """

    def __init__(
        self,
        *,
        param_dtype: str | None = None,
        reduce_dtype: str = "float32",
        reshard_after_forward: bool = True,
        init_on_meta: bool = False,
    ) -> None:
        for name, value in (("param_dtype", param_dtype), ("reduce_dtype", reduce_dtype)):
            if value is not None and value not in _DTYPES:
                refuse(self, f"{name} must be one of {', '.join(_DTYPES)}, got {value!r}.")
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.reshard_after_forward, self.init_on_meta = reshard_after_forward, init_on_meta

    def policy(self, *, cast_inputs: bool) -> MixedPrecisionPolicy:
        """Return the policy of a unit.

        Args:
            cast_inputs: Whether its forward's floating-point arguments are cast too.
        """
        if self.param_dtype is None:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(
            param_dtype=_DTYPES[self.param_dtype],
            reduce_dtype=_DTYPES[self.reduce_dtype],
            cast_forward_inputs=cast_inputs,
        )


def shard_model(root: nn.Module, model: MTPModel, *, mesh: DeviceMesh, sharding: Sharding | None = None) -> None:
    """Shard a model in place over the processes of a mesh.

    A model that was built on the meta device is allocated and initialised here, one block at a time, so that no process
    ever holds all of it. Values are those of the mesh's first process.

    Args:
        root: Holds the model; its forward runs the model and the loss, as that of
            :class:`~mtp_modules.training.MTPModule` does.
        model: What is sharded.
        mesh: One dimension, the processes to shard over.
        sharding: Precisions and memory; the defaults of :class:`Sharding` if ``None``.

    Raises:
        ValueError: If the mesh has more than one dimension, or the model cannot be materialised; see
            :func:`materialize`.
    """
    if mesh.ndim != 1:
        refuse("shard_model", f"mesh must have one dimension, got {mesh.ndim}; pass the data-parallel one.")
    sharding = Sharding() if sharding is None else sharding
    device = device_of(mesh)
    inner: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": sharding.reshard_after_forward}
    blocks = (*model.trunk.blocks, *model.heads.blocks)
    for block in blocks:
        make_ready(block, device, mesh, ())
        fully_shard(block, mp_policy=sharding.policy(cast_inputs=True), **inner)
    make_ready(root, device, mesh, blocks)
    fully_shard(model.heads, mp_policy=sharding.policy(cast_inputs=True), **inner)
    # The unembedding takes example weights, 1/count, which bfloat16 would round.
    ends = sharding.policy(cast_inputs=False)
    if model.unembedding.tied:
        fully_shard([model.trunk.embedding, model.unembedding], mp_policy=ends, **inner)
    else:
        fully_shard(model.trunk.embedding, mp_policy=ends, **inner)
        fully_shard(model.unembedding, mp_policy=ends, **inner)
    fully_shard(root, mesh=mesh, mp_policy=ends)
    register_fsdp_forward_method(model.unembedding, "logits")
    register_fsdp_forward_method(model.heads, "confidence")


def check_sharding(sharding: Sharding | None, mesh: DeviceMesh | None) -> None:
    """Reject a sharding that the strategy would not apply.

    Args:
        sharding: As configured.
        mesh: Of the strategy; ``None`` if it is not ``ModelParallelStrategy``.

    Raises:
        ValueError: If there is a sharding, and no mesh.
    """
    if sharding is not None and mesh is None:
        refuse("model.sharding", "needs trainer.strategy ModelParallelStrategy; take that, or leave sharding out.")


def materialize(module: nn.Module, device: torch.device, *, without: Iterable[nn.Module] = ()) -> None:
    """Allocate and initialise a module that was built on the meta device.

    Values come from ``reset_parameters``, children first: a parent may initialise its children's parameters again,
    never the other way round. Shared parameters stay shared. A module that is not on the meta device is unchanged.

    Args:
        module: Changed in place.
        device: Target device.
        without: Modules inside it that are materialised elsewhere.

    Raises:
        ValueError: If a part of it is on the meta device and another is not, or a value is left unset.
    """
    skipped = {id(inner) for outer in without for inner in outer.modules()}
    mine = [inner for inner in module.modules() if id(inner) not in skipped]
    if not any(tensor.is_meta for _, _, tensor in _tensors(mine)):
        return
    made: dict[Tensor, Tensor] = {}
    for owner, name, tensor in list(_tensors(mine)):
        if not tensor.is_meta:
            refuse(
                "materialize",
                f"{type(owner).__name__}.{name} has a value, but other parameters are on the meta device; "
                "build the whole model there, or none of it.",
            )
        if tensor not in made:
            unset = torch.nan if tensor.is_floating_point() else 0
            empty = torch.full_like(tensor, unset, device=device)
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        setattr(owner, name, made[tensor])
    for inner in reversed(mine):
        if callable(reset := getattr(inner, "reset_parameters", None)):
            reset()
    for owner, name, tensor in _tensors(mine):
        if tensor.isnan().any() or not (tensor.is_floating_point() or hasattr(owner, "reset_parameters")):
            refuse(
                "materialize",
                f"{type(owner).__name__}.{name} gets no value from reset_parameters; set it there, or do not build "
                "the model on the meta device.",
            )


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield owner, name and value of every parameter and buffer, shared ones once for each owner."""
    for module in modules:
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def make_ready(module: nn.Module, device: torch.device, mesh: DeviceMesh, without: Iterable[nn.Module]) -> None:
    """Materialise and move a module, and broadcast the values of the first process.

    Args:
        module: Changed in place.
        device: Target device.
        mesh: One dimension, the processes.
        without: Modules inside it that are materialised elsewhere.
    """
    materialize(module, device, without=without)
    skipped = {id(inner) for outer in without for inner in outer.modules()}
    sent: set[int] = set()
    with torch.no_grad():
        for owner, _, tensor in _tensors(module.modules()):
            if id(owner) in skipped or id(tensor) in sent:
                continue
            sent.add(id(tensor))
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)
            values = local(tensor).contiguous()
            dist.broadcast(values, group=mesh.get_group(), group_src=0)
            local(tensor).copy_(values)


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return the device of this process.

    Args:
        mesh: Of any dimensions.
    """
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
