"""Heads that say nothing, heads that were never trained, and heads that pull the trunk the wrong way."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mtp_modules.core.mixture import marginal_logits
from mtp_modules.core.shapes import Tensor
from mtp_modules.core.targets import future_targets
from mtp_modules.losses import MultiTokenLoss
from mtp_modules.metrics.functional import counts, figures
from mtp_modules.model import MTPModel
from mtp_modules.training.monitoring import gradient_conflict

TOP_K = (1, 5)
_STILL = 1e-6
_PROBED_POSITIONS = 256

Batch = dict[str, Tensor]
"""``tokens (B, T + max(horizons))``, and optionally ``document_ids`` and ``loss_mask`` alike."""


@dataclass(frozen=True)
class Accuracy:
    """How well one head foretells a text, given the true tokens between.

    Attributes:
        horizon: Its offset.
        loss: Mean, in nats.
        top1: Share of the targets that are its likeliest token.
        top5: Share of the targets that are among its five likeliest.
        commonest: Share of the targets that always saying the commonest of them would get.
        count: Number of targets.
    """

    horizon: int
    loss: float
    top1: float
    top5: float
    commonest: float
    count: int

    @property
    def says_something(self) -> bool:
        """Whether it does better than the commonest token, by more than two standard errors."""
        error = (self.commonest * (1 - self.commonest) / max(self.count, 1)) ** 0.5
        return self.top1 > self.commonest + 2 * error


@torch.inference_mode()
def accuracies(model: MTPModel, batches: Sequence[Batch]) -> list[Accuracy]:
    """Measure every head on batches of text, as validation does.

    Args:
        model: In evaluation mode.
        batches: Held-out text.
    """
    loss = MultiTokenLoss().eval()
    sums: dict[str, Tensor] = {}
    tokens_seen = torch.zeros(len(model.horizons), model.trunk.vocab_size, dtype=torch.long)
    for batch in batches:
        for name, value in counts(loss(model, **batch), TOP_K).items():
            sums[name] = sums[name] + value if name in sums else value
        targets, valid = future_targets(
            batch["tokens"], model.horizons, batch.get("document_ids"), batch.get("loss_mask")
        )
        for index in range(len(model.horizons)):
            tokens_seen[index] += (
                targets[:, :, index][valid[:, :, index]].bincount(minlength=tokens_seen.shape[1]).cpu()
            )
    found = figures(sums, TOP_K)
    total = tokens_seen.sum(dim=1)
    commonest = tokens_seen.amax(dim=1) / total.clamp(min=1)
    return [
        Accuracy(
            horizon=horizon,
            loss=found[f"loss/head_{index + 1}"].item(),
            top1=found[f"accuracy/head_{index + 1}"].item(),
            top5=found[f"top5_accuracy/head_{index + 1}"].item(),
            commonest=commonest[index].item(),
            count=int(total[index]),
        )
        for index, horizon in enumerate(model.horizons)
    ]


@torch.inference_mode()
def heads_without_input(model: MTPModel, batch: Batch) -> list[int]:
    """Return the horizons whose law is the same at every position, whatever was read.

    Args:
        model: In evaluation mode.
        batch: Text that is not everywhere the same.
    """
    states = model(batch["tokens"], document_ids=batch.get("document_ids"))
    still = []
    for index, horizon in enumerate(model.horizons):
        law = marginal_logits(states, index, model.unembedding.logits, _PROBED_POSITIONS).double().softmax(dim=-1)
        if (law.amax(dim=0) - law.amin(dim=0)).max() < _STILL:
            still.append(horizon)
    return still


def untouched_parameters(heads: nn.Module) -> list[str]:
    """Return the names of parameters that still have the value that every initialisation gives them.

    Only what does not start at random can be told so: gains, biases, matrices that start at zero. Of a matrix, single
    rows are named: they may belong to different heads.

    Args:
        heads: Whose modules draw their parameters by ``reset_parameters``.
    """
    fresh = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            twin = copy.deepcopy(heads).cpu()
            for module in reversed(list(twin.modules())):
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            fresh.append(dict(twin.named_parameters()))
    names = []
    for name, parameter in heads.named_parameters():
        first, second = (twin[name].detach() for twin in fresh)
        value = parameter.detach().cpu()
        if value.ndim < 2:
            if torch.equal(first, second) and torch.equal(value, first):
                names.append(name)
            continue
        same = ((first == second) & (value == first)).flatten(1).all(dim=1)
        names += [f"{name}[{row}]" for row in range(len(same)) if same[row]] if not same.all() else [name]
    return names


def gradient_cosines(model: MTPModel, batch: Batch) -> list[float | None]:
    """Return for each horizon the cosine between its gradient in the trunk and that of horizon 1.

    Below 0 the head pulls the trunk away from where the next token pulls it. See
    :class:`~mtp_modules.training.monitoring.GradientConflict`.

    Args:
        model: Trunk, heads and unembedding; neither its parameters nor their gradients change.
        batch: Text.

    Returns:
        One number a horizon; ``None`` for horizon 1.
    """
    loss, size = MultiTokenLoss(), len(model.horizons)
    parameters = list(model.trunk.parameters())
    needed = [parameter.requires_grad for parameter in parameters]
    training = model.training

    def gradient(index: int) -> tuple[Tensor, ...]:
        weights = [float(place == index) for place in range(size)]
        terms = loss(model, **batch, weights=weights)
        return torch.autograd.grad(terms.loss, parameters, allow_unused=True, materialize_grads=True)

    model.train()  # recurrent kernels of a GPU know no other backward pass
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        near = gradient(0)
        return [None, *(gradient_conflict(near, gradient(index))[0].item() for index in range(1, size))]
    finally:
        model.train(training)
        for parameter, before in zip(parameters, needed, strict=True):
            parameter.requires_grad_(before)
