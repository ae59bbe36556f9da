"""Convert the result of a backend into the terms for metrics and logs. Only the loss carries gradients."""

from collections.abc import Sequence

import torch

from mtp_modules.core.objective import CrossEntropyTerms
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Bool, Int, Tensor
from mtp_modules.core.targets import at_positions, in_order_of_drafts, positions_of_horizon_one
from mtp_modules.losses.examples import Examples


def loss_terms(
    terms: CrossEntropyTerms,
    examples: Examples,
    horizons: Sequence[int],
    *,
    scored: Bool[Tensor, "B P K"],
    dtype: torch.dtype,
) -> LossTerms:
    """Return the loss with the per-horizon values that metrics need.

    Args:
        terms: Of all examples, head by head.
        examples: The examples.
        horizons: Offsets of the heads.
        scored: Which targets of horizons beyond the first count and can be scored by them.
        dtype: Of the mean losses.
    """
    nll, far_nll = examples.near_far(terms.nll)
    rank, far_rank = examples.near_far(terms.rank)
    predicted, far_predicted = examples.near_far(terms.predicted)
    valid = at_positions(examples.valid, examples.positions)
    if not nll.numel():
        rank = predicted = torch.full_like(examples.targets[:, :, 0], -1)
        valid[:, :, 0] = False
    count = torch.cat((examples.near_valid.sum()[None], scored.sum(dim=(0, 1))))
    sums = torch.cat((nll.double().sum()[None], torch.where(examples.far_valid, far_nll.double(), 0.0).sum(dim=(0, 1))))
    agrees, comparable = agreement(predicted, far_predicted, valid, examples, horizons)
    return LossTerms(
        loss=terms.loss,
        nll=(sums / count.clamp(min=1)).to(dtype),
        count=count,
        rank=torch.cat((at_positions(rank, examples.positions)[:, :, None], far_rank), dim=2),
        valid=valid,
        agrees=agrees,
        comparable=comparable,
    )


def agreement(
    predicted: Int[Tensor, "B T"],
    far_predicted: Int[Tensor, "B P K"],
    valid: Bool[Tensor, "B P H"],
    examples: Examples,
    horizons: Sequence[int],
) -> tuple[Bool[Tensor, "B P G"], Bool[Tensor, "B P"]]:
    """Return ``agrees`` and ``comparable`` of :class:`~mtp_modules.core.outputs.LossTerms`.

    Args:
        predicted: The most likely token of horizon 1 at every position.
        far_predicted: Of the other horizons, where they are trained.
        valid: Which targets count there.
        examples: Has the positions.
        horizons: Offsets of the heads.
    """
    agrees, read = agreement_by_horizon(predicted, far_predicted, examples, horizons)
    both_known = read & valid
    if max(horizons) > len(horizons):  # some drafts come from earlier positions, which may not be sampled
        agrees = in_order_of_drafts(agrees, horizons)
        both_known = in_order_of_drafts(both_known, horizons) & (not examples.sampled)
    return agrees, both_known.all(dim=2)


def agreement_by_horizon(
    predicted: Int[Tensor, "B T"], far_predicted: Int[Tensor, "B P K"], examples: Examples, horizons: Sequence[int]
) -> tuple[Bool[Tensor, "B P H"], Bool[Tensor, "B P H"]]:
    """Return whether each horizon's argmax is that of horizon 1 for the same token, and where this counts.

    It counts where the target does, and where horizon 1 has read the text up to the target.

    Args:
        predicted: The most likely token of horizon 1 at every position.
        far_predicted: Of the other horizons, where they are trained.
        examples: Has the positions, and which targets count.
        horizons: Offsets of the heads.
    """
    same = positions_of_horizon_one(examples.positions, horizons)
    rows = torch.arange(len(predicted), device=predicted.device)[:, None, None]
    own = predicted[rows, same.clamp(max=predicted.shape[1] - 1)]
    agrees = torch.cat((at_positions(predicted, examples.positions)[:, :, None], far_predicted), dim=2) == own
    return agrees, comparable_by_horizon(examples, horizons)


def comparable_by_horizon(examples: Examples, horizons: Sequence[int]) -> Bool[Tensor, "B P H"]:
    """Return where a target counts and horizon 1 has read the text up to it.

    Args:
        examples: Has the positions, and which targets count.
        horizons: Offsets of the heads.
    """
    read = positions_of_horizon_one(examples.positions, horizons) < examples.valid.shape[1]
    return read & at_positions(examples.valid, examples.positions)
