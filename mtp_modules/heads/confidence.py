"""DSpark's confidence head: how likely each draft is accepted, predicted before the draft is sampled."""

from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Heads
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.heads.wrapped import WrappedHeads


class ConfidenceHeads(WrappedHeads):
    r"""Predict, for every draft of other heads, the probability that it will be accepted.

    The state :math:`s_h` that a draft is sampled from gives the probability

    .. math:: c_h = \sigma(w \cdot s_h + b)

    It rests on the text and on the drafts before, not on the draft itself. So decoding may leave a draft out because
    its probability is low, and the output keeps its distribution: ``ConfidentDepth(predicted=True)``. The state of
    :class:`TransitionHeads` includes the factors of the token before. DSpark 2026 (arXiv 2607.05147), the confidence
    head.

    :class:`~mtp_modules.MultiTokenLoss` trains :math:`w` and :math:`b` by binary cross-entropy against whether the
    horizon's argmax is that of horizon 1 for the same token, which is greedy acceptance. States get no gradient from
    it, so the drafts are those of the heads without it.

    Args:
        heads: Any heads with one state per horizon.

    Shape:
        That of the heads.

    Raises:
        ValueError: If the heads have a mixture, or a confidence already.

    Example:
        >>> import torch
        >>> from mtp_modules import LinearHeads
        >>> heads = ConfidenceHeads(heads=LinearHeads(d_model=8, num_horizons=3))
        >>> heads.confidence(torch.zeros(2, 1, 8)).sigmoid().tolist()
        [[0.5], [0.5]]
    """

    def __init__(self, *, heads: Heads) -> None:
        super().__init__(heads)
        if heads.predicts_acceptance:
            refuse(self, f"heads must have no confidence yet, got {type(heads).__name__} with one; leave one out.")
        self.predicts_acceptance = len(heads.horizons) > 1
        self.to_confidence = nn.Linear(heads.d_model + heads.transition_rank, 1) if self.predicts_acceptance else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from a probability of 1/2 for every draft."""
        if self.to_confidence is not None:
            nn.init.zeros_(self.to_confidence.weight)
            nn.init.zeros_(self.to_confidence.bias)

    def confidence(self, states: Float[Tensor, "B N W"]) -> Float[Tensor, "B N"] | None:
        """Return the log-odds that the draft of each state is accepted."""
        return None if self.to_confidence is None else self.to_confidence(states)[..., 0]

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of the heads, and of one product per state beyond horizon 1."""
        own = 0 if self.to_confidence is None else 2 * self.to_confidence.in_features * num_far * self.states_scored
        return super().flops(length, num_far) + own
