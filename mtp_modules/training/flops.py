"""How many floating-point operations training takes, counted from the components' own formulas."""

from typing import Any

from mtp_modules.core.checks import at_least, fraction
from mtp_modules.core.targets import num_sampled
from mtp_modules.model import MTPModel


def training_flops(model: MTPModel, *, batch_size: int, length: int, share_of_positions: float = 1.0) -> int:
    """Return the floating-point operations of one training step: forward, and twice as many backward.

    The count covers the matrix products of trunk, heads and output matrix, independent of the implementation; a
    multiplication and an addition count as two. It leaves out everything that is not a matrix product, embedding
    look-ups, and repeated work: activation checkpointing, recomputed logits, a teacher's logits. A tied matrix counts
    once, as the output. A model with frozen parts takes fewer.

    Args:
        model: Trunk, heads and unembedding.
        batch_size: Number ``B`` of rows.
        length: Number ``T`` of positions that the trunk reads of each.
        share_of_positions: Share of the positions at which horizons beyond the first are trained; that of the loss.

    Raises:
        ValueError: If a size is below 1 or the share lies outside (0, 1].

    Example:
        >>> from mtp_modules import LinearHeads, RecurrentTrunk
        >>> trunk = RecurrentTrunk(vocab_size=50, d_model=16, cell="rnn")  # two matrices of 16 x 16
        >>> model = MTPModel(trunk=trunk, heads=LinearHeads(d_model=16, num_horizons=3))
        >>> training_flops(model, batch_size=1, length=1) == 3 * 2 * (2 * 16 * 16 + 3 * 16 * 16 + 3 * 50 * 16)
        True
    """
    at_least("training_flops", "batch_size", batch_size, 1)
    at_least("training_flops", "length", length, 1)
    fraction("training_flops", "share_of_positions", share_of_positions, zero=False)
    far = num_sampled(length, share_of_positions)
    near_rows, far_rows = len(model.unembedding.weight), len(model.unembedding.matrix(1).weight)
    width = model.trunk.d_model
    far_width = width + (0 if model.unembedding.transition is None else model.unembedding.transition.shape[1])
    unembedding = 2 * (width * near_rows * length + far_width * far_rows * model.heads.states_scored * far)
    return 3 * batch_size * (model.trunk.flops(length) + model.heads.flops(length, far) + unembedding)


def flops_per_token(model: MTPModel, *, length: int, share_of_positions: float = 1.0) -> float:
    """Return :func:`training_flops` per position that the trunk reads, in sequences of ``length``.

    Args:
        model: Trunk, heads and unembedding.
        length: Number ``T`` of positions of a sequence, on which the cost of attention depends.
        share_of_positions: Share of the positions at which horizons beyond the first are trained.

    Raises:
        ValueError: If the length is below 1 or the share lies outside (0, 1].
    """
    return training_flops(model, batch_size=1, length=length, share_of_positions=share_of_positions) / length


def step_flops(module: Any, *, batch_size: int, length: int) -> int:
    """Return :func:`training_flops` of a step of a module, plus those of objectives and of a teacher's forward pass.

    Args:
        module: An :class:`~mtp_modules.training.MTPModule`.
        batch_size: Number ``B`` of rows.
        length: Number ``T`` of positions that the trunk reads of each.
    """
    sizes = {"batch_size": batch_size, "length": length, "share_of_positions": module.loss.share_of_positions}
    taught = 0 if module.teacher is None else module.teacher.flops(num_horizons=len(module.horizons), **sizes)
    added = sum(objective.flops(length) for objective in module.objectives)
    return training_flops(module.model, **sizes) + 3 * batch_size * added + int(taught)
