"""Linear + cross-entropy that makes its gradients in the forward pass and delivers them in the backward pass.

What is scored at once is planned beforehand, so that one function serves every order: small chunks that run across
heads, or one whole head after the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.interfaces import CrossEntropyTerms, OutputMatrix, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.losses.plan import Group, first_taught, spans
from mtp_modules.losses.vocabulary_parallel import VocabularyShard, score_shard, vocabulary_shard


class _Place(NamedTuple):
    """Where an output matrix stands among the distinct tensors."""

    weight: int
    bias: int | None


class _Rules(NamedTuple):
    """What a call is told besides tensors; hashable, for the compiler."""

    chunks: tuple[tuple[int, int, _Place], ...]
    law: _Place | None
    first_taught: int
    wanted: tuple[bool, ...]
    label_smoothing: float
    z_loss: float
    shard: VocabularyShard | None


def fused_terms(
    states: Float[Tensor, "N D"],
    groups: Sequence[Group],
    law: OutputMatrix,
    rows: int | None,
    targets: Int[Tensor, " N"],
    example_weights: Float[Tensor, " N"],
    teacher: Teacher | None,
    label_smoothing: float,
    z_loss: float,
) -> CrossEntropyTerms:
    """Score all examples, chunk by chunk.

    Args:
        states: What the heads made.
        groups: Which examples share an output matrix.
        law: Turns the teacher's states into logits.
        rows: How many examples' logits are held at once; a whole group's if ``None``.
        targets: Token to predict; negative where there is none.
        example_weights: Factor of each example in the loss.
        teacher: Share the loss of the last examples with this law.
        label_smoothing: See :class:`~mtp_modules.core.interfaces.LinearCrossEntropy`.
        z_loss: See there too.
    """
    distinct: list[Tensor] = []

    def place(matrix: OutputMatrix) -> _Place:
        return _Place(_index(distinct, matrix.weight), None if matrix.bias is None else _index(distinct, matrix.bias))

    chunks = tuple((*span, place(group.matrix)) for group in groups for span in spans(group, rows))
    rules = _Rules(
        chunks=chunks,
        law=None if teacher is None else place(law),
        first_taught=first_taught(states, teacher),
        wanted=tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (states, *distinct)),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        shard=vocabulary_shard("FusedLinearCrossEntropy", distinct) if distinct else None,
    )
    held = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in distinct)
    taught = (None, None) if teacher is None else (teacher.states, teacher.share)
    terms = _Fused.apply(rules, states, targets, example_weights, *taught, *held)  # type: ignore[no-untyped-call]
    return CrossEntropyTerms(*terms)


def _index(distinct: list[Tensor], tensor: Tensor) -> int:
    """Return a tensor's place in the list, appending it if it is new."""
    for index, known in enumerate(distinct):
        if known is tensor:
            return index
    distinct.append(tensor)
    return len(distinct) - 1


class _Fused(torch.autograd.Function):
    """Gradients made in forward, delivered in backward, with every parameter as an explicit input."""

    @staticmethod
    def forward(
        ctx: Any,
        rules: _Rules,
        states: Tensor,
        targets: Tensor,
        example_weights: Tensor,
        teacher_states: Tensor | None,
        teacher_share: Tensor | None,
        *distinct: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score all chunks, and keep the gradients that backward will deliver."""
        low = _product_dtype(states)
        high = torch.promote_types(low, torch.float32)
        weights, scale = example_weights.detach().to(high), None
        if low == torch.float16 and len(weights):
            # Gradients of 1/count underflow in float16: bring the largest weight to 1, and back in float32 in the end.
            scale = weights.abs().max().clamp(min=torch.finfo(high).tiny)
            weights = weights / scale
        states_gradient = torch.empty_like(states) if rules.wanted[0] else None
        gradients = [
            torch.zeros_like(tensor, dtype=high) if wanted else None
            for tensor, wanted in zip(distinct, rules.wanted[1:], strict=True)
        ]
        loss, parts = weights.new_zeros(()), []
        cast: dict[int, Tensor] = {}
        for start, stop, (at, bias_at) in rules.chunks:
            matrix, chunk_states = _cast(cast, distinct, at, low), states[start:stop].to(low)
            logits = _logits(chunk_states, matrix, None if bias_at is None else distinct[bias_at], high)
            law = share = None
            if rules.law is not None and start >= rules.first_taught:
                rows = slice(start - rules.first_taught, stop - rules.first_taught)
                assert teacher_states is not None
                assert teacher_share is not None
                bias = None if rules.law.bias is None else distinct[rules.law.bias]
                law_matrix = _cast(cast, distinct, rules.law.weight, low)
                law = _logits(teacher_states[rows].to(low), law_matrix, bias, high)
                share = teacher_share[rows].to(high)
            part, *figures = _score(logits, targets[start:stop], weights[start:stop], law, share, rules)
            loss = loss + part
            parts.append(figures)
            if not any(rules.wanted):
                continue
            gradient = logits.to(low)
            if states_gradient is not None:
                states_gradient[start:stop] = gradient @ matrix
            _add_product(gradients[at], gradient, chunk_states)
            if bias_at is not None and (total := gradients[bias_at]) is not None:
                total += logits.sum(dim=0)
        if rules.shard is not None and states_gradient is not None:
            dist.all_reduce(states_gradient, group=rules.shard.group)
        if not parts:
            parts.append([weights, targets, targets])
        nll, rank, predicted = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(scale, states_gradient, *gradients)
        ctx.dtypes = (states.dtype, *(tensor.dtype for tensor in distinct))
        ctx.mark_non_differentiable(nll, rank, predicted)
        ctx.set_materialize_grads(False)
        return loss if scale is None else loss * scale, nll, rank, predicted

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        """Deliver the gradients, times that of the loss."""
        scale, *gradients = ctx.saved_tensors
        given: list[Tensor | None] = [None] * len(gradients)
        if outer[0] is not None:
            factor = outer[0] if scale is None else outer[0] * scale
            for index, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
                if gradient is not None:
                    given[index] = (gradient * factor).to(dtype)
        return None, given[0], None, None, None, None, *given[1:]


def _product_dtype(states: Tensor) -> torch.dtype:
    """Return the precision of products: autocast's if it is on, otherwise that of the states."""
    device = states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def _cast(cast: dict[int, Tensor], distinct: Sequence[Tensor], at: int, dtype: torch.dtype) -> Tensor:
    """Return an output matrix in the precision of products, casting it once a call."""
    if at not in cast:
        cast[at] = distinct[at].to(dtype)
    return cast[at]


def _logits(states: Tensor, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = F.linear(states, matrix).to(dtype)
    return logits if bias is None else logits.add_(bias)


def _add_product(total: Tensor | None, gradient: Tensor, states: Tensor) -> None:
    """Add a chunk's share of an output matrix's gradient, if anybody wants it."""
    if total is None:
        return
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.mT, states)
    else:
        total += gradient.mT @ states


def _score(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    law: Float[Tensor, "N V"] | None,
    share: Float[Tensor, " N"] | None,
    rules: _Rules,
) -> CrossEntropyTerms:
    """Score a chunk from its logits and those of the teacher's law; overwrite its logits by their gradient."""
    epsilon, zeta = rules.label_smoothing, rules.z_loss
    if rules.shard is not None:
        given = (logits, targets, weights, law, share, rules.shard)
        return score_shard(*given, label_smoothing=epsilon, z_loss=zeta, gradient=any(rules.wanted))
    law = None if law is None else law.softmax(dim=1)
    counts, targets = targets >= 0, targets.clamp(min=0)[:, None]
    own = logits.gather(1, targets)
    rank, predicted = (logits > own).sum(dim=1), logits.argmax(dim=1)
    top = logits.gather(1, predicted[:, None])
    even = logits.mean(dim=1, keepdim=True) if epsilon else None
    imitated = None if law is None else (law * logits).sum(dim=1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    normaliser = total.log() + top
    nll = normaliser - own
    example_loss = nll if even is None else torch.lerp(nll, normaliser - even, epsilon)
    if imitated is not None and share is not None:
        example_loss = torch.lerp(example_loss, normaliser - imitated, share[:, None])
    if zeta:
        example_loss = example_loss + zeta * normaliser.square()
    loss = torch.where(counts, example_loss[:, 0] * weights, 0.0).sum()
    if any(rules.wanted):
        weights = torch.where(counts, weights, 0.0)[:, None]
        logits.mul_(weights * (1 + 2 * zeta * normaliser) / total if zeta else weights / total)
        observed = weights
        if law is not None and share is not None:
            logits.addcmul_(law, weights * share[:, None], value=-1)
            observed = weights * (1 - share[:, None])
        if epsilon:
            logits.sub_(observed * (epsilon / logits.shape[1]))
        logits.scatter_add_(1, targets, -observed * (1 - epsilon))
    return CrossEntropyTerms(loss, torch.where(counts, nll[:, 0], 0.0), rank, predicted)
