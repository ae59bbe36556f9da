"""The result of a loss, for metrics and logs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mtp_modules.core.auxiliary import AuxiliaryTerms
from mtp_modules.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class LossTerms:
    """The result of the loss. Only ``loss`` carries gradients.

    Attributes:
        loss: Weighted sum of the horizons' mean losses, and of those of the auxiliary objectives.
        nll: ``(H,)``, unweighted mean negative log-likelihood per horizon in nats; 0 where nothing counts.
        count: ``(H,)``, number of targets that ``nll`` is the mean of: the valid ones, without those outside a
            horizon's draft vocabulary.
        rank: ``(B, P, H)``, number of logits above the target's.
        valid: ``(B, P, H)``, which targets count.
        agrees: ``(B, P, G)``, whether the horizon's argmax equals that of horizon 1 once it has read the text up to
            there, which is greedy acceptance of a draft. ``G`` is ``H``; where horizons leap, it is the farthest one,
            and earlier positions predict the tokens between.
        comparable: ``(B, P)``, positions where ``agrees`` is known for all of them.
        auxiliary: Terms of each auxiliary objective, by its name.
    """

    loss: Float[Tensor, ""]
    nll: Float[Tensor, " H"]
    count: Int[Tensor, " H"]
    rank: Int[Tensor, "B P H"]
    valid: Bool[Tensor, "B P H"]
    agrees: Bool[Tensor, "B P G"]
    comparable: Bool[Tensor, "B P"]
    auxiliary: Mapping[str, AuxiliaryTerms] = field(default_factory=dict)
