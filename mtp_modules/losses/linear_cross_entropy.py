"""Backends of the operation that dominates the memory of MTP training: output matrix + cross-entropy."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.losses.fused import fused_terms, wide_dtype, wide_logits, without_autocast
from mtp_modules.losses.infinities import weighted
from mtp_modules.losses.plain import plain_terms
from mtp_modules.losses.plan import default_rows, groups_of, rows_taught, spans
from mtp_modules.losses.vocabulary_parallel import held_part, refuse_sharded


class NaiveLinearCrossEntropy(LinearCrossEntropy):
    r"""Materialise all logits: the simplest backend, and the reference for the tests of all others.

    Memory grows with ``N * V``. Fine for bytes; use another backend for a real vocabulary.

    With logits :math:`z`, :math:`p = \mathrm{softmax}(z)`, target :math:`y`, label smoothing :math:`\epsilon`, z-loss
    :math:`\zeta` (Chowdhery et al. 2022, arXiv 2204.02311, section 5) and a teacher's logits :math:`u` with share
    :math:`s`, temperature :math:`\tau` and share of total variation :math:`\nu`, the loss of an example is

    .. math:: (1 - s) \Bigl[-(1 - \epsilon) \log p_y - \frac{\epsilon}{V} \sum_v \log p_v\Bigr]
              + s \, \tau^2 \Bigl[-(1 - \nu) \sum_v q_v \log p^\tau_v + \frac{\nu}{2} \sum_v |p^\tau_v - q_v|\Bigr]
              + \zeta \Bigl(\log \sum_v e^{z_v}\Bigr)^2

    where :math:`q = \mathrm{softmax}(u / \tau)` and :math:`p^\tau = \mathrm{softmax}(z / \tau)`, and :math:`\tau^2`
    keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531, section 2). Cross-entropy against :math:`q` is the
    forward Kullback-Leibler divergence plus the entropy of :math:`q`, so it has the same gradient. Smoothing belongs to
    the observed token only, not to the teacher's distribution. The z-loss does not depend on the teacher's share.
    """

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        matrices: Sequence[OutputMatrix],
        sizes: Sequence[int],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and the values that metrics need; see the interface."""
        refuse_sharded(self, matrices)
        parts = []
        for start, stop, matrix in groups_of(self, states, matrices, sizes, teacher, merge=True):
            rows = slice(start, stop)
            taught = rows_taught(teacher, states, start, stop)
            given = (states[rows], matrix, targets[rows], example_weights[rows], matrices[0], taught)
            parts.append(_plainly(*given, label_smoothing, z_loss))
        return _joined(parts, targets, example_weights)


class FusedLinearCrossEntropy(LinearCrossEntropy):
    """Process the examples in chunks, and compute the gradients in the forward pass, from each chunk's logits.

    Only the logits of one chunk are held, whatever the number of heads. Nothing is computed twice: a chunk's gradients
    of states and output matrix are computed in the forward pass and returned in the backward pass, so that DDP, FSDP2,
    accumulation and gradient scalers work as usual. Chunks may span heads that share an output matrix. Matrix products
    use the states' precision (or autocast's; float32 on a CPU without instructions for it), the softmax and the output
    matrix's gradient at least float32. Where the output matrices are sharded over the vocabulary (a ``DTensor`` with
    ``Shard(0)``), every process scores its own tokens, and logits are never gathered.

    Args:
        rows_per_chunk: How many examples' logits are held at once; if ``None``, 256, or more where the vocabulary is so
            small that they come to less than 4 million numbers.

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
        matrices: Sequence[OutputMatrix],
        sizes: Sequence[int],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and the values that metrics need; see the interface."""
        _check_weights(self, example_weights)
        groups = groups_of(self, states, matrices, sizes, teacher, merge=True)
        rows = self.rows_per_chunk or default_rows(len(held_part(matrices[0].weight)))
        given = (targets, example_weights, teacher, label_smoothing, z_loss)
        return fused_terms(states, groups, matrices[0], rows, *given)


class RecomputeLinearCrossEntropy(LinearCrossEntropy):
    """Process the examples in chunks, and recompute each chunk's logits in the backward pass.

    It needs as little memory as the fused backend, and one more matrix product. It uses plain autograd, so the example
    weights may be learned.

    Args:
        rows_per_chunk: How many examples' logits are held at once; if ``None``, 256, or more where the vocabulary is so
            small that they come to less than 4 million numbers.

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
        matrices: Sequence[OutputMatrix],
        sizes: Sequence[int],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and the values that metrics need; see the interface."""
        refuse_sharded(self, matrices)
        parts = []
        size = self.rows_per_chunk or default_rows(len(matrices[0].weight))
        for group in groups_of(self, states, matrices, sizes, teacher, merge=True):
            matrix = _cast(group.matrix, torch.promote_types(group.matrix.weight.dtype, torch.float32))
            for start, stop in spans(group, size):  # gradients of the matrix add up in float32
                rows = slice(start, stop)
                taught = rows_taught(teacher, states, start, stop)
                given = (states[rows], matrix, targets[rows], example_weights[rows], matrices[0], taught)
                terms = checkpoint(
                    _plainly, *given, label_smoothing, z_loss, use_reentrant=False, preserve_rng_state=False
                )
                parts.append(CrossEntropyTerms(*terms))
        return _joined(parts, targets, example_weights)


class SequentialLinearCrossEntropy(LinearCrossEntropy):
    """Process one head at a time, with all of its logits, and compute its gradients before the next head's logits.

    The order of Gloeckle et al. 2024 (arXiv 2404.19737), section 2: the logits of one head are held, not those of all.
    As in the fused backend, the backward pass returns the gradients of the forward pass. The fused backend needs less
    memory and no more time; this one is for comparison, and for accelerators on which large products are faster.
    """

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        matrices: Sequence[OutputMatrix],
        sizes: Sequence[int],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and the values that metrics need; see the interface."""
        _check_weights(self, example_weights)
        groups = groups_of(self, states, matrices, sizes, teacher, merge=False)
        given = (targets, example_weights, teacher, label_smoothing, z_loss)
        return fused_terms(states, groups, matrices[0], None, *given)


class TorchLinearCrossEntropy(LinearCrossEntropy):
    """Use torch's own ``linear_cross_entropy``, where the installed torch has it.

    A cross-check by independent code, not the fastest backend: torch recomputes the logits in the backward pass, since
    every example has a weight, and returns no ranks, so that the metrics need the logits once more. It has no label
    smoothing in chunks, no z-loss and no teacher.

    Args:
        rows_per_chunk: How many examples' logits are held at once; if ``None``, 256, or more where the vocabulary is so
            small that they come to less than 4 million numbers. Torch's own choice is many times slower.

    Raises:
        ValueError: If ``rows_per_chunk`` is below 1, or the installed torch lacks the function.
    """

    def __init__(self, *, rows_per_chunk: int | None = None) -> None:
        if rows_per_chunk is not None:
            at_least(self, "rows_per_chunk", rows_per_chunk, 1)
        if not (hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")):
            refuse(
                self,
                f"torch {torch.__version__} has no linear_cross_entropy with chunks; "
                "install torch 2.13 or later, or use FusedLinearCrossEntropy.",
            )
        self.rows_per_chunk = rows_per_chunk

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        matrices: Sequence[OutputMatrix],
        sizes: Sequence[int],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and the values that metrics need; see the interface.

        Raises:
            ValueError: If an option is given that torch's function lacks.
        """
        refuse_sharded(self, matrices)
        for name, given in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("teacher", teacher)):
            if given:
                refuse(self, f"{name} is not possible with torch's function; leave it out, or use another backend.")
        size = self.rows_per_chunk or default_rows(len(matrices[0].weight))
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
        dtype = wide_dtype(states)
        parts = []
        for group in groups_of(self, states, matrices, sizes, None, merge=True):
            rows = slice(group.start, group.stop)
            weight, bias = matrix = _cast(group.matrix, dtype)
            given_states, given_targets = states[rows].to(dtype), targets[rows].clamp(min=-1)
            with without_autocast(states):
                nll = F.linear_cross_entropy(
                    given_states,
                    weight,
                    given_targets,
                    linear_bias=bias,
                    reduction="none",
                    ignore_index=-1,
                    options=options,
                )
                figures = _figures(given_states, matrix, given_targets, size)
            counts = given_targets >= 0
            nll = torch.where(counts, nll.to(torch.promote_types(dtype, torch.float32)), 0.0)
            parts.append(CrossEntropyTerms(weighted(nll, example_weights[rows], counts).sum(), nll.detach(), *figures))
        return _joined(parts, targets, example_weights)


@torch.no_grad()
def _figures(states: Tensor, matrix: OutputMatrix, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return rank and prediction of each example, chunk by chunk."""
    parts = []
    for start in range(0, len(states), rows):
        logits = F.linear(states[start : start + rows], *matrix)
        own = logits.gather(1, targets[start : start + rows, None].clamp(min=0))
        parts.append(((logits > own).sum(dim=1), logits.argmax(dim=1)))
    rank, predicted = (torch.cat(column) for column in zip(*parts, strict=True))
    return rank, predicted


def _plainly(
    states: Float[Tensor, "N D"],
    matrix: OutputMatrix,
    targets: Int[Tensor, " N"],
    example_weights: Float[Tensor, " N"],
    teacher_matrix: OutputMatrix,
    teacher: Teacher | None,
    label_smoothing: float,
    z_loss: float,
) -> CrossEntropyTerms:
    """Score examples that share a matrix and all have a teacher or none, by ordinary autograd."""
    logits, taught = wide_logits(states, matrix), None
    if teacher is not None:
        with torch.no_grad():
            taught = wide_logits(teacher.states, teacher.matrix or teacher_matrix, like=states)
    return plain_terms(
        logits, targets, example_weights, teacher, taught, label_smoothing=label_smoothing, z_loss=z_loss
    )


def _cast(matrix: OutputMatrix, dtype: torch.dtype) -> OutputMatrix:
    return OutputMatrix(matrix.weight.to(dtype), None if matrix.bias is None else matrix.bias.to(dtype))


def _joined(parts: Sequence[CrossEntropyTerms], targets: Tensor, example_weights: Tensor) -> CrossEntropyTerms:
    """Put the terms of all chunks together."""
    if not parts:
        nothing = example_weights * 0
        return CrossEntropyTerms(nothing.sum(), nothing.detach(), targets, targets)
    loss = torch.stack([part.loss for part in parts]).sum()
    nll = torch.cat([part.nll for part in parts])
    rank = torch.cat([part.rank for part in parts])
    predicted, distance = torch.cat([part.predicted for part in parts]), None
    if any(part.distance is not None for part in parts):
        distance = torch.cat([torch.zeros_like(p.nll) if p.distance is None else p.distance for p in parts])
    return CrossEntropyTerms(loss, nll, rank, predicted, distance)


def _check_weights(owner: LinearCrossEntropy, example_weights: Tensor) -> None:
    if example_weights.requires_grad and torch.is_grad_enabled():
        refuse(
            owner,
            "example_weights requires a gradient, which this backend does not make; "
            "detach it, or use RecomputeLinearCrossEntropy to learn the weights.",
        )
