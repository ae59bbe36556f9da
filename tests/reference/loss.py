"""The multi-token loss, one target at a time."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mtp_modules import MTPModel
from tests.reference.targets import future_targets


def multi_token_loss(
    model: MTPModel,
    tokens: Tensor,
    weights: list[float],
    *,
    document_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    distillation: float = 0.0,
    total_variation: float = 0.0,
    log_acceptance: bool = False,
    lk_eta: float = 0.0,
) -> Tensor:
    """Sum over horizons of weight times the mean loss of the targets that count."""
    states = model(tokens, document_ids=document_ids)
    targets, valid = future_targets(tokens, model.horizons, document_ids, loss_mask)
    rows, length, _ = targets.shape
    total = torch.zeros((), dtype=states[0].dtype)
    for index, h in enumerate(model.horizons):
        losses = []
        for b in range(rows):
            for t in range(length):
                if not valid[b, t, index]:
                    continue
                logits = model.unembedding.logits(states[index][b, t], index)
                can_say = logits > -torch.inf  # all tokens, or few where drafts are trimmed
                if not can_say[targets[b, t, index]]:
                    losses.append(torch.zeros_like(logits[0]))
                    continue
                log_probs = F.log_softmax(logits[can_say], dim=0)
                loss = -log_probs[can_say[: targets[b, t, index]].sum()]
                if h > 1 and t + h - 1 < length:
                    with torch.no_grad():
                        teacher = F.softmax(model.unembedding.logits(states[0][b, t + h - 1])[can_say], dim=0)
                    overlap = torch.minimum(teacher, log_probs.exp()).sum()
                    nu = total_variation * (1 - math.exp(-lk_eta * overlap.item()) if lk_eta else 1)
                    soft = -(1 - nu) * (teacher * log_probs).sum()
                    soft = soft + nu * (-overlap.log() if log_acceptance else 1 - overlap)
                    loss = (1 - distillation) * loss + distillation * soft
                losses.append(loss)
        if losses:
            total = total + weights[index] * sum(losses) / len(losses)
    return total
