"""Output matrix and a loss against a few tokens of the vocabulary as one operation: never all logits, nor all targets.

Like the fused loss of the horizons, it computes its gradients in the forward pass, some rows at a time.
"""

from typing import Any, NamedTuple

import torch

from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.losses.fused import product_dtype
from mtp_modules.losses.plan import default_rows


class SparseTargets(NamedTuple):
    """What each example should give a share of its probability to; no target repeats within an example.

    Attributes:
        tokens: ``(N, S)``, ids; any valid one where the mass is 0.
        mass: ``(N, S)``, not negative.
    """

    tokens: Int[Tensor, "N S"]
    mass: Float[Tensor, "N S"]


class SparseTerms(NamedTuple):
    """Result for ``N`` examples.

    Attributes:
        loss: Weighted sum; the only part with gradients.
        each: ``(N,)``, losses, unweighted.
        predicted: ``(N,)``, the argmax.
    """

    loss: Float[Tensor, ""]
    each: Float[Tensor, " N"]
    predicted: Int[Tensor, " N"]


def sparse_terms(
    states: Float[Tensor, "N D"],
    matrix: Float[Tensor, "V D"],
    targets: SparseTargets,
    example_weights: Float[Tensor, " N"],
    *,
    token_weights: Float[Tensor, " V"] | None = None,
    rows: int | None = None,
) -> SparseTerms:
    r"""Score states against a few tokens each.

    With logits :math:`z` and masses :math:`q`, the loss of an example is the cross-entropy
    :math:`-\sum_v q_v \log \mathrm{softmax}(z)_v`; with weights :math:`w` of the tokens, the binary cross-entropy of
    every token by itself, :math:`\sum_v w_v (\mathrm{softplus}(z_v) - q_v z_v)`.

    Args:
        states: One per example.
        matrix: Output matrix.
        targets: Of each example.
        example_weights: Factor of each example in the loss.
        token_weights: Of the binary cross-entropy; the softmax's cross-entropy if ``None``.
        rows: How many rows of logits are held at once; about 4 million numbers if ``None``.
    """
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (states, matrix))
    rows = default_rows(len(matrix)) if rows is None else rows
    loss, each, predicted = _Sparse.apply(  # type: ignore[no-untyped-call]
        (rows, *wanted), states, matrix, targets.tokens, targets.mass, example_weights, token_weights
    )
    return SparseTerms(loss, each, predicted)


class _Sparse(torch.autograd.Function):
    """Gradients computed in forward, returned in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rules: tuple[int, bool, bool],
        states: Tensor,
        matrix: Tensor,
        tokens: Tensor,
        mass: Tensor,
        example_weights: Tensor,
        token_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score some rows at a time, and save the gradients for the backward pass."""
        rows, wants_states, wants_matrix = rules
        low = product_dtype(states)
        low = torch.float32 if low == torch.float16 else low  # logits beyond 65504 overflow
        high = torch.promote_types(low, torch.float32)
        own, weights = matrix.to(low), example_weights.to(high)
        states_gradient = torch.empty_like(states, dtype=high) if wants_states else None
        matrix_gradient = torch.zeros_like(matrix, dtype=high) if wants_matrix else None
        each, predicted = weights.new_empty(len(states)), tokens.new_empty(len(states))
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            chunk = states[part].to(low)
            logits = (chunk @ own.mT).to(high)
            predicted[part] = logits.argmax(dim=1)
            q, factor = mass[part].to(high), weights[part, None]
            if token_weights is None:
                whole = q.sum(dim=1, keepdim=True)
                hit = (q * logits.gather(1, tokens[part])).sum(dim=1)
                top = logits.amax(dim=1, keepdim=True)
                total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
                each[part] = ((total.log() + top) * whole)[:, 0] - hit
                gradient = logits.mul_(whole * factor / total)
            else:
                q = q * token_weights.to(high)[tokens[part]]
                hit = (q * logits.gather(1, tokens[part])).sum(dim=1)
                each[part] = (torch.nn.functional.softplus(logits) * token_weights).sum(dim=1) - hit
                gradient = logits.sigmoid_().mul_(token_weights).mul_(factor)
            if not (wants_states or wants_matrix):
                continue
            gradient.scatter_add_(1, tokens[part], -q * factor)
            narrow = gradient.to(low)
            if states_gradient is not None:
                states_gradient[part] = (narrow @ own).to(high)
            if matrix_gradient is not None:
                matrix_gradient += narrow.mT @ chunk
        ctx.save_for_backward(states_gradient, matrix_gradient)
        ctx.dtypes = states.dtype, matrix.dtype
        ctx.mark_non_differentiable(each, predicted)
        ctx.set_materialize_grads(False)
        return (each * weights).sum(), each, predicted

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients, times that of the loss."""
        given = [
            None if gradient is None or outer[0] is None else (gradient * outer[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *given, None, None, None, None


def first_occurrences(tokens: Int[Tensor, "*N W"], valid: Tensor) -> Tensor:
    """Return which valid tokens have no equal valid token before them.

    Args:
        tokens: In order.
        valid: Of the same shape; others do not count.
    """
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    keys = torch.where(valid, tokens.clamp(min=0), -1 - places)  # what does not count equals nothing
    ordered, order = keys.sort(dim=-1, stable=True)
    again = torch.zeros_like(valid)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return valid & ~torch.zeros_like(valid).scatter(-1, order, again)
