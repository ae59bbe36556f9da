"""Backends of the one operation that MTP training spends its memory on: output matrix + cross-entropy."""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from mtp_modules.core.checks import at_least
from mtp_modules.core.interfaces import CrossEntropyTerms, LinearCrossEntropy, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor


class NaiveLinearCrossEntropy(LinearCrossEntropy):
    """Hold all logits: the plainest way, and the oracle that every other backend is tested against.

    Memory grows with ``N * V``. Fine for bytes; use another backend for a real vocabulary.
    """

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and what metrics need; see the interface."""
        logits = F.linear(states, weight, bias)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        counts = targets >= 0
        targets = targets.clamp(min=0)
        nll = F.cross_entropy(logits, targets, reduction="none")
        example_loss = nll
        if teacher is not None:
            with torch.no_grad():
                law = F.linear(teacher.states, weight, bias).to(logits.dtype).softmax(dim=-1)
            example_loss = torch.lerp(nll, F.cross_entropy(logits, law, reduction="none"), teacher.share.to(nll.dtype))
        with torch.no_grad():
            own = logits.gather(1, targets[:, None])
            rank = (logits > own).sum(dim=1)
            predicted = logits.argmax(dim=1)
        loss = torch.where(counts, example_loss * example_weights, 0.0).sum()
        return CrossEntropyTerms(loss, torch.where(counts, nll.detach(), 0.0), rank, predicted)


class FusedLinearCrossEntropy(LinearCrossEntropy):
    """Go through the examples in chunks, and make the gradients while a chunk's logits are at hand.

    The logits of one chunk are all that is ever held, whatever the number of heads. No work is done twice: a chunk's
    gradients of states and output matrix are computed in the forward pass and delivered in the backward pass, so that
    DDP, FSDP2, accumulation and gradient scalers see an ordinary operation. Products are taken in the states' precision
    (or autocast's), the softmax and the output matrix's gradient in float32 at least.

    Args:
        rows_per_chunk: How many examples' logits are held at once; if ``None``, 256, or more where the vocabulary is so
            small that they come to less than 8 million numbers.

    Raises:
        ValueError: If ``rows_per_chunk`` is below 1.
    """

    def __init__(self, *, rows_per_chunk: int | None = None) -> None:
        if rows_per_chunk is not None:
            at_least(self, "rows_per_chunk", rows_per_chunk, 1)
        self.rows_per_chunk = rows_per_chunk

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and what metrics need; see the interface."""
        loss, nll, rank, predicted = _Fused.apply(  # type: ignore[no-untyped-call]
            states,
            weight,
            bias,
            targets,
            example_weights,
            None if teacher is None else teacher.states,
            None if teacher is None else teacher.share,
            self.rows_per_chunk or _default_rows(len(weight)),
            torch.is_grad_enabled(),
        )
        return CrossEntropyTerms(loss, nll, rank, predicted)


class RecomputeLinearCrossEntropy(LinearCrossEntropy):
    """Go through the examples in chunks, and compute each chunk's logits again in the backward pass.

    As little memory as the fused backend, one matrix product more. Everything is ordinary autograd, so the example
    weights may be learned.

    Args:
        rows_per_chunk: How many examples' logits are held at once; if ``None``, 256, or more where the vocabulary is so
            small that they come to less than 8 million numbers.

    Raises:
        ValueError: If ``rows_per_chunk`` is below 1.
    """

    def __init__(self, *, rows_per_chunk: int | None = None) -> None:
        if rows_per_chunk is not None:
            at_least(self, "rows_per_chunk", rows_per_chunk, 1)
        self.rows_per_chunk = rows_per_chunk

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and what metrics need; see the interface."""
        naive = NaiveLinearCrossEntropy()
        parts: list[CrossEntropyTerms] = []
        size = self.rows_per_chunk or _default_rows(len(weight))
        for start in range(0, max(len(states), 1), size):
            rows = slice(start, start + size)
            taught = None if teacher is None else Teacher(teacher.states[rows], teacher.share[rows])
            given = (states[rows], weight, bias, targets[rows], example_weights[rows], taught)
            parts.append(CrossEntropyTerms(*checkpoint(naive, *given, use_reentrant=False)))
        loss = torch.stack([part.loss for part in parts]).sum()
        nll, rank, predicted = (torch.cat([part[index] for part in parts]) for index in (1, 2, 3))
        return CrossEntropyTerms(loss, nll, rank, predicted)


def _default_rows(vocab_size: int) -> int:
    """Return how many rows of logits make a chunk."""
    return max(256, (1 << 23) // vocab_size)


class _Chunk(NamedTuple):
    """What one chunk contributes; gradients are of the loss, ``None`` where nobody asks."""

    loss: Tensor
    nll: Tensor
    rank: Tensor
    predicted: Tensor
    logits_gradient: Tensor | None


def _chunk(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    teacher: tuple[Float[Tensor, "N V"], Float[Tensor, " N"]] | None,
    gradient: bool,
) -> _Chunk:
    """Score one chunk, overwriting its logits by their gradient."""
    counts, targets = targets >= 0, targets.clamp(min=0)[:, None]
    own = logits.gather(1, targets)
    rank, predicted = (logits > own).sum(dim=1), logits.argmax(dim=1)
    top = logits.gather(1, predicted[:, None])
    normaliser = (logits - top).exp_().sum(dim=1, keepdim=True).log_() + top
    nll = (normaliser - own)[:, 0]
    example_loss, share = nll, None
    if teacher is not None:
        law, share = teacher[0].softmax(dim=1), teacher[1][:, None]
        soft = (normaliser - (law * logits).sum(dim=1, keepdim=True))[:, 0]
        example_loss = torch.lerp(nll, soft, share[:, 0])
    loss = torch.where(counts, example_loss * weights, 0.0).sum()
    if gradient:
        logits.sub_(normaliser).exp_()
        hit = torch.ones_like(own) if share is None else 1 - share
        logits.scatter_add_(1, targets, -hit)
        if share is not None:
            logits.sub_(law.mul_(share))
        logits.mul_(torch.where(counts, weights, 0.0)[:, None])
    return _Chunk(loss, torch.where(counts, nll, 0.0), rank, predicted, logits if gradient else None)


def _logits(states: Tensor, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = F.linear(states, matrix).to(dtype)
    return logits if bias is None else logits.add_(bias)


def _taught_chunks(share: Tensor | None, rows: int) -> list[bool]:
    """Return which chunks have a teacher at all, with one look from the host."""
    if share is None:
        return []
    padded = F.pad(share, (0, -len(share) % rows))
    found: list[bool] = (padded.view(-1, rows) != 0).any(dim=1).tolist()
    return found


class _Fused(torch.autograd.Function):
    """Gradients made in forward, delivered in backward, with every parameter as an explicit input."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        example_weights: Tensor,
        teacher_states: Tensor | None,
        teacher_share: Tensor | None,
        rows_per_chunk: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score all chunks, and keep the gradients that backward will deliver."""
        device = states.device.type
        low = (
            torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else states.dtype
        )
        high = torch.promote_types(low, torch.float32)
        matrix = weight.to(low)
        wants_states, wants_weight, wants_bias = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:3])
        weights, scale = example_weights.detach().to(high), None
        if low == torch.float16 and len(weights):
            # Gradients of 1/count underflow in float16: bring the largest weight to 1, and back in float32 in the end.
            scale = weights.abs().max().clamp(min=torch.finfo(high).tiny)
            weights = weights / scale
        states_gradient = torch.empty_like(states) if wants_states else None
        weight_gradient = torch.zeros_like(weight, dtype=high) if wants_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=high) if wants_bias and bias is not None else None
        taught = _taught_chunks(teacher_share, rows_per_chunk)
        loss, parts = weights.new_zeros(()), []
        for index, start in enumerate(range(0, len(states), rows_per_chunk)):
            rows = slice(start, start + rows_per_chunk)
            chunk_states = states[rows].to(low)
            logits = _logits(chunk_states, matrix, bias, high)
            teacher = None
            if teacher_states is not None and teacher_share is not None and taught[index]:
                teacher = _logits(teacher_states[rows].to(low), matrix, bias, high), teacher_share[rows].to(high)
            chunk = _chunk(logits, targets[rows], weights[rows], teacher, wants_states or wants_weight or wants_bias)
            loss += chunk.loss
            parts.append(chunk[1:4])
            if chunk.logits_gradient is None:
                continue
            gradient = chunk.logits_gradient.to(low)
            if states_gradient is not None:
                states_gradient[rows] = gradient @ matrix
            if weight_gradient is not None:
                if low == high:
                    weight_gradient.addmm_(gradient.mT, chunk_states)
                else:
                    weight_gradient += gradient.mT @ chunk_states
            if bias_gradient is not None:
                bias_gradient += chunk.logits_gradient.sum(dim=0)
        if not parts:
            parts.append((weights, targets, targets))
        nll, rank, predicted = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(states_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (states.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.scale = scale
        if scale is not None:
            loss = loss * scale
        ctx.mark_non_differentiable(nll, rank, predicted)
        ctx.set_materialize_grads(False)
        return loss, nll, rank, predicted

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        """Deliver the gradients, times that of the loss."""
        given: list[Tensor | None] = [None] * 9
        if outer[0] is not None:
            for index, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
                if gradient is not None:
                    factor = outer[0] if ctx.scale is None else outer[0] * ctx.scale
                    given[index] = (gradient * factor).to(dtype)
        return tuple(given)
