"""Cross-entropy with output matrices that are sharded over the vocabulary; no process holds all logits.

Two small exchanges per chunk share what the softmax needs: first each process's largest logit and the target's own,
then sums over its part of the vocabulary (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from mtp_modules.core.checks import is_distributed, refuse
from mtp_modules.core.objective import CrossEntropyTerms, OutputMatrix
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.losses.infinities import blended, expected, weighted


class VocabularyShard(NamedTuple):
    """Which part of the vocabulary this process holds.

    Attributes:
        group: The processes that hold the vocabulary together, in its order.
        start: First token of this process's part.
        vocab_size: Number ``V`` of all tokens.
    """

    group: dist.ProcessGroup
    start: int
    vocab_size: int


def vocabulary_shard(tensors: Sequence[Tensor]) -> VocabularyShard | None:
    """Return how output matrices and biases are sharded, or ``None`` if they are whole.

    Args:
        tensors: All of them; where one is a ``DTensor``, all must be sharded alike.

    Raises:
        ValueError: If some are sharded and others are not, or otherwise than by rows over one group of processes.
    """
    distributed: list[Any] = [tensor for tensor in tensors if is_distributed(tensor)]
    if not distributed:
        return None
    mesh, vocab_size = distributed[0].device_mesh, len(distributed[0])
    by_rows = all(t.device_mesh == mesh and [p.is_shard(0) for p in t.placements] == [True] for t in distributed)
    if len(distributed) < len(tensors) or not by_rows:
        refuse(
            "LinearCrossEntropy",
            "output matrices and biases must all be whole, or all be sharded by rows over the same processes "
            "(Shard(0) on a mesh of one dimension); tensor_parallelize does that.",
        )
    rows = -(-vocab_size // mesh.size())
    return VocabularyShard(mesh.get_group(), min(mesh.get_local_rank() * rows, vocab_size), vocab_size)


def held_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of an output matrix or bias, as a differentiable plain tensor.

    Args:
        tensor: A plain tensor, which is returned unchanged, or a ``DTensor``.
    """
    distributed: Any = tensor
    part: Tensor = distributed.to_local() if is_distributed(tensor) else tensor
    return part


def refuse_sharded(owner: object, matrices: Sequence[OutputMatrix]) -> None:
    """Raise an error for output matrices that are sharded over the vocabulary.

    Args:
        owner: The backend that needs them whole.
        matrices: One per head.

    Raises:
        ValueError: If one is a ``DTensor``.
    """
    if any(is_distributed(matrix.weight) for matrix in matrices):
        refuse(
            owner,
            "the output matrix is sharded over the vocabulary by tensor parallelism, and this backend needs it whole; "
            "take FusedLinearCrossEntropy.",
        )


def score_shard(
    logits: Float[Tensor, "N v"],
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    taught: tuple[Float[Tensor, "N v"], Float[Tensor, " N"]] | None,
    shard: VocabularyShard,
    *,
    label_smoothing: float,
    z_loss: float,
    gradient: bool,
) -> CrossEntropyTerms:
    """Score a chunk from this process's shard of its logits, and overwrite them by their gradient if requested.

    Every process of the group calls this with the same examples, and all return the same result.

    Args:
        logits: Of this process's ``v`` tokens; overwritten, as are the teacher's.
        targets: Token to predict; negative where there is none.
        weights: Factor of each example in the loss.
        taught: The teacher's logits of the same tokens, and its share.
        shard: Which tokens these are.
        label_smoothing: See :class:`~mtp_modules.core.interfaces.LinearCrossEntropy`.
        z_loss: See there.
        gradient: Whether to compute the gradient of the loss.
    """
    counts, column, held = _places(targets, logits.shape[1], shard)
    teacher, share = (None, None) if taught is None else taught
    own = torch.where(held, logits.gather(1, column)[:, 0], 0.0)
    top, own, predicted, teacher_top = _exchange_tops(logits, own, teacher, shard)
    # A count and a token id are exact as floating-point numbers, up to 2**24 in float32.
    sums = [(logits > own).sum(dim=1).to(logits.dtype)]
    if label_smoothing:
        sums.append(logits.sum(dim=1))
    if teacher is not None:
        teacher.sub_(teacher_top).exp_()
        sums += [teacher.sum(dim=1), expected(teacher, logits)[:, 0]]
    sums.append(logits.sub_(top).exp_().sum(dim=1))
    added = torch.stack(sums)
    dist.all_reduce(added, group=shard.group)
    above, *between, total = added[:, :, None]

    normaliser = total.log() + top
    nll = normaliser - own
    example_loss = nll
    if label_smoothing:
        even = between.pop(0) / shard.vocab_size
        example_loss = blended(nll, normaliser - even, label_smoothing)
    if teacher is not None and share is not None:
        teacher_total, imitated = between
        example_loss = blended(example_loss, normaliser - imitated / teacher_total, share[:, None])
        teacher.div_(teacher_total)
    if z_loss:
        example_loss = example_loss + z_loss * normaliser.square()
    loss = weighted(example_loss[:, 0], weights, counts).sum()
    if gradient:
        weights = torch.where(counts, weights, 0.0)[:, None]
        logits.mul_(weights * (1 + 2 * z_loss * normaliser) / total)
        observed = weights
        if teacher is not None and share is not None:
            logits.addcmul_(teacher, weights * share[:, None], value=-1)
            observed = weights * (1 - share[:, None])
        if label_smoothing:
            logits.sub_(observed * (label_smoothing / shard.vocab_size))
        logits.scatter_add_(1, column, torch.where(held[:, None], -observed * (1 - label_smoothing), 0.0))
    return CrossEntropyTerms(loss, torch.where(counts, nll[:, 0], 0.0), above[:, 0].long(), predicted)


def _places(
    targets: Int[Tensor, " N"], held_tokens: int, shard: VocabularyShard
) -> tuple[Bool[Tensor, " N"], Int[Tensor, "N 1"], Bool[Tensor, " N"]]:
    """Return which examples count, each target's column in this shard, and whether the target is in this shard.

    Where there is no target, token 0 replaces it, as in the other backends.
    """
    place = targets.clamp(min=0) - shard.start
    return targets >= 0, place.clamp(0, held_tokens - 1)[:, None], (place >= 0) & (place < held_tokens)


def _exchange_tops(
    logits: Float[Tensor, "N v"], own: Float[Tensor, " N"], teacher: Float[Tensor, "N v"] | None, shard: VocabularyShard
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"], Int[Tensor, " N"], Float[Tensor, "N 1"]]:
    """Return the largest logit, the target's, the first token with the largest, and the teacher's largest logit."""
    top, place = logits.max(dim=1)
    sent = [top, (place + shard.start).to(logits.dtype), own]
    if teacher is not None:
        sent.append(teacher.amax(dim=1))
    mine = torch.stack(sent)
    gathered = mine.new_empty(shard.group.size(), *mine.shape)
    dist.all_gather(list(gathered), mine, group=shard.group)
    highest, holder = gathered[:, 0].max(dim=0)  # the first of equals, whose tokens come first
    predicted = gathered[:, 1].gather(0, holder[None])[0].long()
    return highest[:, None], gathered[:, 2].sum(dim=0)[:, None], predicted, gathered[:, -1].amax(dim=0)[:, None]
