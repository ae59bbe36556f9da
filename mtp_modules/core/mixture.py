"""States of heads that predict the next tokens with a joint distribution."""

from collections.abc import Callable
from typing import NamedTuple

from mtp_modules.core.shapes import Float, Tensor


class MixtureStates(NamedTuple):
    """States of heads whose joint distribution of the tokens beyond horizon 1 is a mixture.

    Under each component the tokens are independent. The loss is the negative log-likelihood of the joint distribution,
    computed as the sum over horizons of each token's term given the tokens before it.

    Attributes:
        first: ``(B, T, D)``, horizon 1's states.
        components: ``(B, P, K, R, D)``, ``R`` states per horizon beyond the first.
        log_weights: ``(B, P, R)``, logarithms of the mixture weights, which sum to 1.
    """

    first: Float[Tensor, "B T D"]
    components: Float[Tensor, "B P K R D"]
    log_weights: Float[Tensor, "B P R"]


def marginal_logits(
    states: tuple[Tensor, ...], index: int, unembed: Callable[[Tensor, int], Tensor], most: int | None = None
) -> Float[Tensor, "N V"]:
    """Return logits of a horizon at the positions that it has states for, row after row.

    For a mixture they are the log probabilities of the horizon's marginal distribution given the text alone.

    Args:
        states: States that a model returned.
        index: 0 for horizon 1.
        unembed: Turns states of the horizon with a given index into logits.
        most: Maximum number of positions, the first ones; all if ``None``.
    """
    if index == 0 or not isinstance(states, MixtureStates):
        return unembed(states[index].flatten(0, 1)[:most], index)
    components = states.components[:, :, index - 1].flatten(0, 1)[:most]
    log_weights = states.log_weights.flatten(0, 1)[:most, :, None]
    return (log_weights + unembed(components, index).log_softmax(dim=-1)).logsumexp(dim=1)
