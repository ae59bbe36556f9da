"""The targets of every horizon in a batch, which of them are valid, and their weights in the loss."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mtp_modules.core.shapes import Bool, Float, Int, Shaped, Tensor
from mtp_modules.core.targets import at_positions, future_targets


class Examples(NamedTuple):
    """Targets of horizon 1 at every position, or at none, and of the other horizons where they are trained.

    Attributes:
        targets: ``(B, T, H)``, tokens.
        valid: ``(B, T, H)``, which of them count.
        positions: ``(B, P)``, where horizons beyond the first are trained.
        sampled: Whether those are not all positions.
        near_targets: ``(B, T)``, horizon 1's, negative where it does not count; ``(B, 0)`` if it is not scored.
        near_valid: Of the same shape, which count.
        far_targets: ``(B, P, K)``, those of the others, negative where they do not count.
        far_valid: ``(B, P, K)``, which count.
    """

    targets: Int[Tensor, "B T H"]
    valid: Bool[Tensor, "B T H"]
    positions: Int[Tensor, "B P"]
    sampled: bool
    near_targets: Int[Tensor, "B N"]
    near_valid: Bool[Tensor, "B N"]
    far_targets: Int[Tensor, "B P K"]
    far_valid: Bool[Tensor, "B P K"]

    @property
    def thinning(self) -> float:
        """Number of positions divided by the number at which horizons beyond the first are trained."""
        return self.valid.shape[1] / self.positions.shape[1]

    def without_first(self) -> "Examples":
        """Return the examples without those of horizon 1."""
        return self._replace(near_targets=self.near_targets[:, :0], near_valid=self.near_valid[:, :0])

    def scale(self, weights: Sequence[float], counts: Int[Tensor, " H"], dtype: torch.dtype) -> Float[Tensor, " H"]:
        """Return the factor of one example of each horizon in the loss.

        Args:
            weights: One per horizon.
            counts: Number of targets that the loss is the mean of, per horizon.
            dtype: Of the result.
        """
        scale = torch.tensor(weights, device=self.valid.device, dtype=torch.float64) / counts.clamp(min=1)
        scale[1:] *= self.thinning
        return scale.to(dtype)

    def weighed(self, scale: Float[Tensor, " H"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B P K"]]:
        """Return the weight of each example of horizon 1, and of the others: 0 where it does not count.

        Args:
            scale: Of one example of each horizon.
        """
        return self.near_valid * scale[0], self.far_valid * scale[1:]

    def near_far(self, values: Shaped[Tensor, " M"]) -> tuple[Shaped[Tensor, "B N"], Shaped[Tensor, "B P K"]]:
        """Split the result of a backend, head by head, into that of horizon 1 and that of the others.

        Args:
            values: One for each example, in the order of :func:`head_by_head`.
        """
        split, (rows, positions, far) = self.near_valid.numel(), self.far_valid.shape
        by_head = values[split:].view(far, rows, positions)
        return values[:split].view_as(self.near_valid), by_head.permute(1, 2, 0)


def examples_of(
    tokens: Int[Tensor, "B L"],
    horizons: Sequence[int],
    positions: Int[Tensor, "B P"] | None,
    *,
    document_ids: Int[Tensor, "B L"] | None = None,
    loss_mask: Bool[Tensor, "B L"] | None = None,
) -> Examples:
    """Return the examples of a batch.

    Args:
        tokens: Token ids, ``L = T + max(horizons)``.
        horizons: Offsets of the heads.
        positions: Where horizons beyond the first are trained; everywhere if ``None``.
        document_ids: Which document every token belongs to.
        loss_mask: False at tokens that are no targets.
    """
    targets, valid = future_targets(tokens, horizons, document_ids, loss_mask)
    masked = targets.masked_fill(~valid, -1)
    every = torch.arange(valid.shape[1], device=tokens.device).expand(len(tokens), -1)
    far_targets, far_valid = masked, valid
    if positions is not None:
        far_targets, far_valid = at_positions(masked, positions), at_positions(valid, positions)
    return Examples(
        targets=targets,
        valid=valid,
        positions=every if positions is None else positions,
        sampled=positions is not None,
        near_targets=masked[:, :, 0],
        near_valid=valid[:, :, 0],
        far_targets=far_targets[:, :, 1:],
        far_valid=far_valid[:, :, 1:],
    )


def head_by_head(near: Shaped[Tensor, "B N"], far: Shaped[Tensor, "B P K"]) -> Shaped[Tensor, " M"]:
    """Flatten the values of horizon 1, then those of each further horizon.

    Args:
        near: Of horizon 1.
        far: Of the others.
    """
    return torch.cat((near.flatten(), far.permute(2, 0, 1).flatten()))
