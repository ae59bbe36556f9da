"""Output matrix and cross-entropy, one example at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_modules.core.objective import OutputMatrix, Teacher


def logits_of(state: Tensor, matrix: OutputMatrix) -> Tensor:
    """Return the logits of one state."""
    return matrix.weight @ state if matrix.bias is None else matrix.weight @ state + matrix.bias


def linear_cross_entropy(
    states: Tensor,
    matrices: Sequence[OutputMatrix],
    sizes: Sequence[int],
    targets: Tensor,
    example_weights: Tensor,
    teacher: Teacher | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, list[float], list[int], list[int]]:
    """Return the loss, and nll, rank and prediction of every example."""
    loss, nll, rank, predicted = 0 * states.sum(), [], [], []
    owners = [matrix for matrix, size in zip(matrices, sizes, strict=True) for _ in range(size)]
    untaught = len(states) if teacher is None else len(states) - len(teacher.states)
    for index, (state, matrix) in enumerate(zip(states, owners, strict=True)):
        target, logits = int(targets[index]), logits_of(state, matrix)
        predicted.append(int(logits.argmax()))
        rank.append(int((logits > logits[max(target, 0)]).sum()))
        log_probs = logits - logits.exp().sum().log()
        nll.append(0.0 if target < 0 else -log_probs[target].item())
        if target < 0:
            continue
        example = -(1 - label_smoothing) * log_probs[target] - label_smoothing * log_probs.mean()
        if teacher is not None and index >= untaught:
            with torch.no_grad():
                told = logits_of(teacher.states[index - untaught], teacher.matrix or matrices[0])
                probs = (told / teacher.temperature).softmax(dim=0)
            soft = logits / teacher.temperature
            log_soft = soft - soft.exp().sum().log()
            nu = teacher.total_variation
            distance = (log_soft.exp() - probs).abs().sum() / 2
            if teacher.lk_eta:
                nu = nu * (1 - math.exp(-teacher.lk_eta * (1 - distance.item())))
            imitation = -(1 - nu) * (probs * log_soft).sum()
            imitation = imitation + nu * (-(1 - distance).log() if teacher.log_acceptance else distance)
            share = teacher.share[index - untaught]
            example = (1 - share) * example + share * teacher.temperature**2 * imitation
        loss = loss + example_weights[index] * (example + z_loss * logits.exp().sum().log() ** 2)
    return loss, nll, rank, predicted
