"""The loss of some examples from their logits, which are overwritten by their gradient."""

from typing import NamedTuple

import torch

from mtp_modules.core.objective import CrossEntropyTerms
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.losses.argmax import max_and_argmax
from mtp_modules.losses.infinities import blended, expected, weighted
from mtp_modules.losses.vocabulary_parallel import VocabularyShard, score_shard


class Place(NamedTuple):
    """Indices of an output matrix and its bias in the list of distinct tensors."""

    weight: int
    bias: int | None


class Rules(NamedTuple):
    """Options of a call besides tensors; hashable, for the compiler."""

    chunks: tuple[tuple[int, int, Place], ...]
    rows: int
    teacher: Place | None
    first_taught: int
    wanted: tuple[bool, ...]
    label_smoothing: float
    z_loss: float
    shard: VocabularyShard | None
    temperature: float
    total_variation: float
    log_acceptance: bool
    lk_eta: float


def score(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    taught: tuple[Float[Tensor, "N V"], Float[Tensor, " N"]] | None,
    rules: Rules,
) -> CrossEntropyTerms:
    """Return the loss of some examples, and their nll, rank and prediction; overwrite their logits by the gradient.

    Args:
        logits: In the precision of the softmax.
        targets: Token to predict; negative where there is none.
        weights: Factor of each example in the loss.
        taught: The teacher's logits, which are overwritten too, and its share.
        rules: Options, and which tensors need a gradient.
    """
    epsilon, zeta = rules.label_smoothing, rules.z_loss
    if rules.shard is not None:
        wanted = any(rules.wanted)
        return score_shard(
            logits, targets, weights, taught, rules.shard, label_smoothing=epsilon, z_loss=zeta, gradient=wanted
        )
    counts, targets = targets >= 0, targets.clamp(min=0)[:, None]
    own, (top, predicted) = logits.gather(1, targets), max_and_argmax(logits)
    rank = (logits > own).sum(dim=1, dtype=torch.int32).long()
    even = logits.mean(dim=1, keepdim=True) if epsilon else None
    tau = rules.temperature
    nu: float | Tensor = rules.total_variation
    probs = share = imitated = soft = soft_total = variation = None
    if taught is not None:
        probs, share = taught[0], taught[1][:, None]
        probs.sub_(probs.amax(dim=1, keepdim=True)).div_(tau).exp_()
        probs.div_(probs.sum(dim=1, keepdim=True))
        imitated = expected(probs, logits)
        if tau != 1.0:  # otherwise the student's softened distribution is the plain one
            soft = logits.sub(top).div_(tau).exp_()
            soft_total = soft.sum(dim=1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    normaliser = total.log() + top
    nll = normaliser - own
    example_loss = nll if even is None else blended(nll, normaliser - even, epsilon)
    if imitated is not None and share is not None:
        imitation = normaliser - imitated
        if soft_total is not None:
            imitation = tau * (tau * soft_total.log() + top - imitated)
        if nu and probs is not None:
            own_probs = logits / total if soft is None or soft_total is None else soft / soft_total
            variation = _Variation(own_probs, probs, log_acceptance=rules.log_acceptance)
            nu = share_of_variation(variation.distance, rules.total_variation, rules.lk_eta)
            imitation = blended(imitation, tau**2 * variation.value, nu)
        example_loss = blended(example_loss, imitation, share)
    if zeta:
        example_loss = example_loss + zeta * normaliser.square()
    loss = weighted(example_loss[:, 0], weights, counts).sum()
    if any(rules.wanted):
        weights = torch.where(counts, weights, 0.0)[:, None]
        observed = weights if share is None else weights * (1 - share)
        plain = observed  # without temperature, the teacher's part has the same softmax and is added
        if share is not None and soft is None:
            plain = observed + weights * share * (1 - nu)
        logits.mul_((plain + 2 * zeta * weights * normaliser) / total if zeta else plain / total)
        if probs is not None and share is not None:
            crossed = weights * share * (1 - nu)
            logits.addcmul_(probs, crossed, value=-tau)
            if soft is not None and soft_total is not None:
                logits.addcmul_(soft, crossed / soft_total, value=tau)
            if variation is not None:
                logits.addcmul_(variation.gradient(), weights * share * nu, value=tau)
        if epsilon:
            logits.sub_(observed * (epsilon / logits.shape[1]))
        logits.scatter_add_(1, targets, -observed * (1 - epsilon))
    distance = None if variation is None else variation.distance[:, 0]
    return CrossEntropyTerms(loss, torch.where(counts, nll[:, 0], 0.0), rank, predicted, distance)


class _Variation:
    """Total variation distance of two distributions, and its gradient with respect to the logits of the first.

    Args:
        probs: ``(N, V)``, overwritten.
        other: ``(N, V)``.
        log_acceptance: Instead of the distance, minus the logarithm of 1 minus it: of the overlap.
    """

    def __init__(self, probs: Float[Tensor, "N V"], other: Float[Tensor, "N V"], *, log_acceptance: bool) -> None:
        excess = probs - other
        self._overlap: Tensor | None = None
        if log_acceptance:
            self._overlap = overlap_above_zero(probs, other)
            self.value, self.distance = -self._overlap.log(), (1 - self._overlap).clamp_(min=0)
        else:
            self.value = self.distance = 0.5 * excess.abs().sum(dim=1, keepdim=True)
        self._probs, self._sign = probs, excess.sign_()

    def gradient(self) -> Float[Tensor, "N V"]:
        """Return ``probs * (mass - below)``, where ``below`` is 1 where ``probs`` is smaller, and ``mass`` its mean.

        For the logarithm, divided by the overlap. The mean under ``probs`` is a sum of small numbers, so it is accurate
        where hardly a draft would be accepted.
        """
        below = self._sign.mul_(-0.5).add_(0.5)  # 1/2 where both are equal
        mass = (self._probs * below).sum(dim=1, keepdim=True)
        found = below.neg_().add_(mass).mul_(self._probs)
        return found if self._overlap is None else found.div_(self._overlap)


def share_of_variation(
    distance: Float[Tensor, "*N"], total_variation: float, lk_eta: float
) -> Float[Tensor, "*N"] | float:
    """Return the share of total variation in the imitation of each example.

    Args:
        distance: Total variation distance; read only with ``lk_eta``.
        total_variation: See :class:`~mtp_modules.core.objective.Teacher`.
        lk_eta: See :class:`~mtp_modules.core.objective.Teacher`.
    """
    return total_variation * -torch.expm1(-lk_eta * (1 - distance)) if lk_eta else total_variation


def overlap_above_zero(probs: Float[Tensor, "N V"], other: Float[Tensor, "N V"]) -> Float[Tensor, "N 1"]:
    """Return the overlap of two distributions, the acceptance of a draft; the smallest normal number instead of 0.

    Args:
        probs: One distribution per row.
        other: Of the same shape.
    """
    return torch.minimum(probs, other).sum(dim=1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
