"""Linear + cross-entropy that computes its gradients in the forward pass and returns them in the backward pass.

The chunks are planned beforehand, so that one function serves every order: small chunks that span heads, or one whole
head after the other.
"""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.objective import CrossEntropyTerms, OutputMatrix, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.losses.plan import Group, check_teacher, first_taught, spans
from mtp_modules.losses.scoring import Place, Rules, score
from mtp_modules.losses.vocabulary_parallel import held_part, vocabulary_shard


def _emulated() -> frozenset[torch.dtype]:
    """Return the precisions that this CPU emulates in software, ten times slower than float32."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if known.get("architecture") != "x86_64":
        return frozenset()
    has = {
        torch.bfloat16: known.get("avx512_bf16") or known.get("amx_bf16"),
        torch.float16: known.get("avx512_fp16") or known.get("amx_fp16"),
    }
    return frozenset(dtype for dtype, native in has.items() if not native)


_EMULATED = _emulated()


def fused_terms(
    states: Float[Tensor, "N D"],
    groups: Sequence[Group],
    first: OutputMatrix,
    rows: int | None,
    targets: Int[Tensor, " N"],
    example_weights: Float[Tensor, " N"],
    teacher: Teacher | None,
    label_smoothing: float,
    z_loss: float,
) -> CrossEntropyTerms:
    """Score all examples, chunk by chunk.

    Args:
        states: States of the heads.
        groups: Which examples share an output matrix.
        first: Horizon 1's output matrix, for the teacher's states where it has no matrix of its own.
        rows: How many examples' logits are held at once; a whole group's if ``None``.
        targets: Token to predict; negative where there is none.
        example_weights: Factor of each example in the loss.
        teacher: Distribution to imitate in a share of the loss of the last examples.
        label_smoothing: See :class:`~mtp_modules.core.objective.LinearCrossEntropy`.
        z_loss: See there.
    """
    distinct: list[Tensor] = []

    def place(matrix: OutputMatrix) -> Place:
        return Place(_index(distinct, matrix.weight), None if matrix.bias is None else _index(distinct, matrix.bias))

    chunks = tuple((*span, place(group.matrix)) for group in groups for span in spans(group, rows))
    check_teacher(teacher, first)
    rules = Rules(
        chunks=chunks,
        rows=max([0, *(stop - start for start, stop, _ in chunks)]),
        teacher=None if teacher is None else place(teacher.matrix or first),
        first_taught=first_taught(states, teacher),
        wanted=tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (states, *distinct)),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        shard=vocabulary_shard(distinct),
        temperature=1.0 if teacher is None else teacher.temperature,
        total_variation=0.0 if teacher is None else teacher.total_variation,
        log_acceptance=teacher is not None and teacher.log_acceptance,
        lk_eta=0.0 if teacher is None else teacher.lk_eta,
    )
    held = (held_part(tensor) for tensor in distinct)
    taught = (None, None) if teacher is None else (teacher.states, teacher.share)
    loss, nll, rank, predicted, distance = _Fused.apply(rules, states, targets, example_weights, *taught, *held)  # type: ignore[no-untyped-call]
    return CrossEntropyTerms(loss, nll, rank, predicted, distance if rules.total_variation else None)


def _index(distinct: list[Tensor], tensor: Tensor) -> int:
    """Return a tensor's place in the list, appending it if it is new."""
    for index, known in enumerate(distinct):
        if known is tensor:
            return index
    distinct.append(tensor)
    return len(distinct) - 1


class _Fused(torch.autograd.Function):
    """Gradients computed in forward, returned in backward, with every parameter as an explicit input."""

    @staticmethod
    def forward(
        ctx: Any,
        rules: Rules,
        states: Tensor,
        targets: Tensor,
        example_weights: Tensor,
        teacher_states: Tensor | None,
        teacher_share: Tensor | None,
        *distinct: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Score all chunks, and save the gradients for the backward pass."""
        low = asked = product_dtype(states)
        high = torch.promote_types(low, torch.float32)
        if states.device.type == "cpu" and (low in _EMULATED or low == torch.float16):
            low = high  # slow here, and float16 overflows beyond 65504
        weights, scale = example_weights.detach().to(high), None
        if asked == torch.float16 and len(weights):
            # Gradients of 1/count underflow in float16: scale the largest weight to 1, and undo it in float32 later.
            scale = weights.abs().max().clamp(min=torch.finfo(high).tiny)
            weights = weights / scale
        states_gradient = torch.empty_like(states) if rules.wanted[0] else None
        gradients = [
            torch.zeros_like(tensor, dtype=high) if wanted else None
            for tensor, wanted in zip(distinct, rules.wanted[1:], strict=True)
        ]
        products = _Products(rules, distinct, low, high)
        loss, parts = weights.new_zeros(()), []
        for start, stop, place in rules.chunks:
            chunk_states = states[start:stop].to(low)
            logits = products.logits(chunk_states, place)
            teacher_logits, share = None, None
            if rules.teacher is not None and start >= rules.first_taught:
                rows = slice(start - rules.first_taught, stop - rules.first_taught)
                assert teacher_states is not None
                assert teacher_share is not None
                teacher_logits = products.logits(teacher_states[rows].to(low), rules.teacher, buffer="teacher")
                share = teacher_share[rows]
            for tile in _tiles(logits) if rules.shard is None else [slice(0, len(logits))]:
                own = slice(start + tile.start, start + tile.stop)
                taught = None
                if teacher_logits is not None and share is not None:
                    taught = (teacher_logits[tile], share[tile].to(high))
                part, *figures, distance = score(logits[tile], targets[own], weights[own], taught, rules)
                loss = loss + part
                parts.append([*figures, torch.zeros_like(weights[own]) if distance is None else distance])
            if not any(rules.wanted):
                continue
            gradient = products.narrow(logits)
            if states_gradient is not None:
                states_gradient[start:stop] = gradient @ products.matrix(place.weight)
            _add_product(gradients[place.weight], gradient, chunk_states)
            if place.bias is not None and (total := gradients[place.bias]) is not None:
                total += logits.sum(dim=0)
        if rules.shard is not None and states_gradient is not None:
            dist.all_reduce(states_gradient, group=rules.shard.group)
        if not parts:
            parts.append([weights, targets, targets, weights])
        nll, rank, predicted, distance = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(scale, states_gradient, *gradients)
        ctx.dtypes = (states.dtype, *(tensor.dtype for tensor in distinct))
        ctx.mark_non_differentiable(nll, rank, predicted, distance)
        ctx.set_materialize_grads(False)
        return loss if scale is None else loss * scale, nll, rank, predicted, distance

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients, times that of the loss."""
        scale, *gradients = ctx.saved_tensors
        given: list[Tensor | None] = [None] * len(gradients)
        if outer[0] is not None:
            factor = outer[0] if scale is None else outer[0] * scale
            for index, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
                if gradient is not None:
                    given[index] = (gradient * factor).to(dtype)
        return None, given[0], None, None, None, None, *given[1:]


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the precision of matrix products: autocast's if it is on, otherwise that of the states.

    Args:
        states: What will be multiplied.
    """
    device = states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def wide_dtype(states: Tensor) -> torch.dtype:
    """Return the precision in which logits cannot overflow: that of matrix products, but float32 for float16.

    Args:
        states: What will be multiplied.
    """
    dtype = product_dtype(states)
    return torch.float32 if dtype == torch.float16 else dtype


def without_autocast(states: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products keep the precision of their factors.

    Args:
        states: What will be multiplied.
    """
    device = states.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def wide_logits(states: Tensor, matrix: OutputMatrix, *, like: Tensor | None = None) -> Tensor:
    """Return logits in float32 at least, from a product that cannot overflow where the states are float16.

    Args:
        states: ``(..., D)``.
        matrix: Output matrix.
        like: Take the precision of products with these states; with ``states`` if ``None``.
    """
    dtype = wide_dtype(states if like is None else like)
    bias = None if matrix.bias is None else matrix.bias.to(dtype)
    with without_autocast(states):
        logits = F.linear(states.to(dtype), matrix.weight.to(dtype), bias)
    return logits.to(torch.promote_types(dtype, torch.float32))


class _Products:
    """Computes the logits of all chunks in the same buffers: allocating memory takes longer than the products."""

    def __init__(self, rules: Rules, distinct: Sequence[Tensor], low: torch.dtype, high: torch.dtype) -> None:
        self.distinct, self.low, self.high = distinct, low, high
        self.rows, self.columns = rules.rows, max([0, *(len(tensor) for tensor in distinct)])
        self.buffers: dict[str, Tensor] = {}
        self.matrices: dict[int, Tensor] = {}

    def matrix(self, at: int) -> Tensor:
        """Return an output matrix in the precision of products, cast once per call."""
        if at not in self.matrices:
            self.matrices[at] = self.distinct[at].to(self.low)
        return self.matrices[at]

    def buffer(self, name: str, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer with one row per state."""
        if name not in self.buffers:
            self.buffers[name] = like.new_empty(self.rows * self.columns, dtype=dtype)
        return self.buffers[name][: len(like) * columns].view(len(like), columns)

    def logits(self, states: Tensor, place: Place, *, buffer: str = "logits") -> Tensor:
        """Return logits in the precision of the softmax."""
        columns = len(self.distinct[place.weight])
        logits = self.buffer(buffer, states, columns, self.high)
        product = logits if self.low == self.high else self.buffer("low", states, columns, self.low)
        torch.mm(states, self.matrix(place.weight).mT, out=product)
        if product is not logits:
            logits.copy_(product)
        return logits if place.bias is None else logits.add_(self.distinct[place.bias])

    def narrow(self, gradient: Tensor) -> Tensor:
        """Return a gradient of logits in the precision of products."""
        if self.low == self.high:
            return gradient
        return self.buffer("low", gradient, gradient.shape[1], self.low).copy_(gradient)


def _tiles(logits: Tensor) -> list[slice]:
    """Split a chunk's rows so that each tile stays in a CPU's cache; the compiler does that by itself."""
    rows = len(logits)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = max(1, (1 << 18) // logits.shape[1])
    return [slice(low, min(low + rows, len(logits))) for low in range(0, len(logits), rows)]


def _add_product(total: Tensor | None, gradient: Tensor, states: Tensor) -> None:
    """Add a chunk's share of an output matrix's gradient, if it is needed."""
    if total is None:
        return
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.mT, states)
    else:
        total += gradient.mT @ states
