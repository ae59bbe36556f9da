"""Cross-entropy of logits that are there as a whole, by ordinary autograd: the formula as it stands."""

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.objective import CrossEntropyTerms, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.losses.infinities import blended, weighted
from mtp_modules.losses.scoring import overlap_above_zero, share_of_variation


def plain_terms(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    example_weights: Float[Tensor, " N"],
    teacher: Teacher | None = None,
    teacher_logits: Float[Tensor, "N V"] | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropyTerms:
    """Score examples all of which have a teacher, or none.

    Args:
        logits: In float32 at least.
        targets: Token to predict; negative if there is none.
        example_weights: Factor of each example in the loss.
        teacher: Distribution to imitate in a share of the loss; its states are not read.
        teacher_logits: Of the teacher.
        label_smoothing: See :class:`~mtp_modules.core.objective.LinearCrossEntropy`.
        z_loss: See :class:`~mtp_modules.core.objective.LinearCrossEntropy`.
    """
    counts, targets = targets >= 0, targets.clamp(min=0)
    nll = F.cross_entropy(logits, targets, reduction="none")
    example_loss, distance = nll, None
    if label_smoothing:
        example_loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if teacher is not None and teacher_logits is not None:
        temperature = teacher.temperature
        with torch.no_grad():
            probs = (teacher_logits / temperature).softmax(dim=-1)
        log_probs = (logits / temperature).log_softmax(dim=-1)
        imitation = -torch.where(probs > 0, probs * log_probs, 0.0).sum(dim=-1)  # 0 log 0 is 0
        if teacher.total_variation:
            variation = 0.5 * (log_probs.exp() - probs).abs().sum(dim=-1)
            distance = variation.detach()
            if teacher.log_acceptance:
                variation = -overlap_above_zero(log_probs.exp(), probs)[:, 0].log()
            nu = share_of_variation(distance, teacher.total_variation, teacher.lk_eta)
            imitation = blended(imitation, variation, nu)
        imitation = temperature**2 * imitation
        example_loss = blended(example_loss, imitation, teacher.share.to(nll.dtype))
    if z_loss:
        example_loss = example_loss + z_loss * logits.logsumexp(dim=1).square()
    with torch.no_grad():
        own = logits.gather(1, targets[:, None])
        rank = (logits > own).sum(dim=1)
        predicted = logits.argmax(dim=1)
    loss = weighted(example_loss, example_weights, counts).sum()
    return CrossEntropyTerms(loss, torch.where(counts, nll.detach(), 0.0), rank, predicted, distance)
