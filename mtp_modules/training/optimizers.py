"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer.

Muon replaces a matrix's momentum by the nearest matrix with orthogonal rows or columns, so that every direction of the
matrix learns at the same rate (Jordan 2024, https://kellerjordan.github.io/posts/muon). Small models on few tokens gain
most.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mtp_modules.core.checks import at_least, finite, refuse, whole
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.core.unembedding import Unembedding

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NOT_HIDDEN = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, Unembedding)


def muon_parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Sort the parameters of a model into those that Muon updates and those that AdamW updates.

    Muon takes every two-dimensional parameter called ``weight`` of a layer that is no embedding, no unembedding and no
    recurrent net of torch's. A weight that such a layer shares (a tied output matrix) stays with AdamW. Frozen
    parameters are in no group.

    Args:
        module: The model.

    Returns:
        One or two groups, without empty ones, each with its flag ``use_muon``.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
        >>> [(group["use_muon"], len(group["params"])) for group in muon_parameter_groups(model)]
        [(True, 1), (False, 2)]
    """
    outside = {id(p) for layer in module.modules() if isinstance(layer, _NOT_HIDDEN) for p in layer.parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.ndim == 2 and name.rpartition(".")[2] == "weight" and id(parameter) not in outside
        (matrices if hidden else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    return [group for group in groups if group["params"]]


def orthogonalize(matrices: Float[Tensor, "N A B"], *, steps: int = 5) -> Float[Tensor, "N A B"]:
    """Move all singular values close to 1, by a Newton-Schulz iteration with a quintic polynomial.

    The coefficients are Jordan's: fast rather than exact, singular values end between about 0.7 and 1.2. Those below a
    thousandth of the Frobenius norm do not get all the way.

    Matrices much wider than high iterate on their Gram matrix instead, which costs half as much. It loses half the
    digits, so not below float32.

    Args:
        matrices: A batch of them, in the precision to compute in.
        steps: How many iterations.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if 2 * x.shape[2] > 3 * x.shape[1] and x.dtype in (torch.float32, torch.float64):
        x = _polynomials_of_gram(x @ x.mT, steps) @ x
    else:
        a, b, c = _COEFFICIENTS
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _polynomials_of_gram(gram: Float[Tensor, "N A A"], steps: int) -> Float[Tensor, "N A A"]:
    """Return the product of all steps' polynomials; each step ``x -> p x`` turns the Gram matrix into ``p gram p``."""
    a, b, c = _COEFFICIENTS
    product = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step + 1 < steps:
            gram = polynomial @ (gram @ polynomial)
    assert product is not None
    return product


class MuonWithAdamW(torch.optim.Optimizer):
    """Update matrices of hidden layers with Muon, and everything else with AdamW.

    The flag ``use_muon`` of a group selects one of the two; :func:`muon_parameter_groups` makes such groups. In a
    group without it (a plain iterable of parameters, named or not), two-dimensional parameters get Muon, the others
    AdamW. **Embeddings and output matrices are two-dimensional too**, so pass groups where the model has them.

    A Muon update of an ``(A, B)`` matrix is scaled by ``0.2 sqrt(max(A, B))``, which gives its entries a root mean
    square of 0.2, about that of an AdamW update, whatever the shape (Liu et al. 2025, arXiv 2502.16982). Every group
    has its own ``lr``, so schedulers scale both kinds.

    Sharded parameters (FSDP2, tensor parallelism) get the same updates as whole ones: a matrix's momentum is gathered
    for the orthogonalisation, which every process does, and each process updates its own part.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate of groups with Muon.
        adamw_lr: Learning rate of groups with AdamW.
        momentum: Of Muon.
        nesterov: Orthogonalise the momentum as it will be, not as it is.
        weight_decay: Decoupled, of groups with Muon. Groups with AdamW have none unless they set it themselves.
        betas: Of AdamW.
        eps: Of AdamW.
        newton_schulz_steps: Iterations of :func:`orthogonalize`.
        low_precision: Orthogonalise in bfloat16 on a GPU. Never on a CPU, where bfloat16 may be slow beyond use.

    Raises:
        ValueError: If a number lies outside its range, or Muon is asked for a parameter that is no matrix.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
        >>> optimizer = MuonWithAdamW(muon_parameter_groups(model), lr=0.01, adamw_lr=0.003)
        >>> [(group["use_muon"], group["lr"]) for group in optimizer.param_groups]
        [(True, 0.01), (False, 0.003)]
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.01,
        adamw_lr: float = 0.003,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        newton_schulz_steps: int = 5,
        low_precision: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("adamw_lr", adamw_lr), ("weight_decay", weight_decay), ("eps", eps)):
            at_least(self, name, value, 0)
            finite(self, name, value)
        for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                refuse(self, f"{name} must lie in [0, 1), got {value}.")
        whole(self, "newton_schulz_steps", newton_schulz_steps, 1)
        self.adamw_lr = adamw_lr
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "betas": tuple(betas),
            "eps": eps,
            "newton_schulz_steps": newton_schulz_steps,
            "low_precision": low_precision,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or two where it has no ``use_muon`` and holds both matrices and others.

        Args:
            param_group: ``params`` and any of the constructor's options.
        """
        if "use_muon" not in param_group:
            parameters = param_group["params"]
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            for use_muon in (True, False):
                mine = [item for item in parameters if (_tensor(item).ndim == 2) == use_muon]
                if mine:
                    self.add_param_group({**param_group, "params": mine, "use_muon": use_muon})
            return
        if not param_group["use_muon"]:
            param_group = {"lr": self.adamw_lr, "weight_decay": 0.0, **param_group}
        super().add_param_group(param_group)
        if param_group["use_muon"]:
            for parameter in self.param_groups[-1]["params"]:
                if parameter.ndim != 2:
                    refuse(
                        self,
                        f"Muon needs matrices, got a parameter of shape {tuple(parameter.shape)}; "
                        "put it into a group with use_muon=False.",
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["use_muon"]:
                self._muon(group, parameters)
            else:
                self._adamw(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
        for (shape, dtype, device), same in alike.items():
            directions = []
            for parameter in same:
                state, gradient = self.state[parameter], parameter.grad
                assert gradient is not None
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = local(state["momentum"]).lerp_(local(gradient), 1 - group["momentum"])
                direction = momentum
                if group["nesterov"]:
                    direction = local(gradient).lerp(momentum, group["momentum"])
                directions.append(_whole(direction, parameter))
            stacked = torch.stack(directions)
            if group["low_precision"] and device.type != "cpu":
                stacked = stacked.bfloat16()
            updates = orthogonalize(stacked, steps=group["newton_schulz_steps"]).to(dtype)
            size = group["lr"] * 0.2 * max(shape) ** 0.5
            for parameter, update in zip(same, updates, strict=True):
                mine = local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
                mine.add_(_part(update, parameter), alpha=-size)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
            state["step"] += 1
            step = state["step"].item()
            assert parameter.grad is not None
            mine, gradient = local(parameter), local(parameter.grad)
            mean = local(state["mean"]).lerp_(gradient, 1 - beta1)
            square = local(state["square"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = square.div(1 - beta2**step).sqrt_().add_(group["eps"])
            mine.mul_(1 - group["lr"] * group["weight_decay"])
            mine.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step))


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, to be changed in place; all of it where it is not sharded.

    Args:
        tensor: A plain tensor or a ``DTensor``.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(part: Tensor, like: Tensor) -> Tensor:
    """Gather a tensor of which every process holds the part that it holds of ``like``."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds of ``like``; all processes have the same tensor."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _tensor(item: Any) -> Tensor:
    """Return the parameter of a ``(name, parameter)`` pair or of a plain one."""
    tensor: Tensor = item if isinstance(item, Tensor) else item[1]
    return tensor
