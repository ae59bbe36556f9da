"""Whom horizons beyond the first imitate: horizon 1, or another model."""

from collections.abc import Sequence

import torch

from mtp_modules.core.objective import NextTokenTeacher, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import positions_of_horizon_one


def teacher_for(
    first: Float[Tensor, "B T D"],
    other: NextTokenTeacher | None,
    positions: Int[Tensor, "B P"],
    horizons: Sequence[int],
    *,
    distillation: float,
    total_variation: float,
    log_acceptance: bool,
    lk_eta: float,
) -> Teacher | None:
    """Return the next-token state for the token that each horizon predicts, up to the positions that were read.

    Horizon 1 teaches the others, or another model teaches all.

    Args:
        first: Horizon 1's states.
        other: The other model, if there is one.
        positions: Where horizons beyond the first are trained.
        horizons: Offsets of the heads.
        distillation: Share of the loss in which horizon 1 is imitated.
        total_variation: See :class:`~mtp_modules.core.objective.Teacher`.
        log_acceptance: See :class:`~mtp_modules.core.objective.Teacher`.
        lk_eta: See :class:`~mtp_modules.core.objective.Teacher`.
    """
    if other is None and (distillation == 0.0 or len(horizons) == 1):
        return None
    measure = total_variation, log_acceptance, lk_eta
    near = first.detach() if other is None else other.states
    length = near.shape[1]
    same = positions_of_horizon_one(positions, horizons[1:]).permute(2, 0, 1).contiguous()
    known = (same < length).flatten().to(torch.promote_types(first.dtype, torch.float32))
    rows = torch.arange(near.shape[0], device=near.device)[:, None]
    far = near[rows, same.clamp(max=length - 1)].flatten(0, 2)
    if other is None:
        return Teacher(far, distillation * known, None, 1.0, *measure)
    share = other.share * torch.cat((known.new_ones(near.shape[0] * length), known))
    return Teacher(torch.cat((near.flatten(0, 1), far)), share, other.matrix, other.temperature, *measure)
