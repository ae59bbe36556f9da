"""Detect heads with constant output, untrained heads, and heads whose gradients conflict with the next token's."""

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
_CONSTANT = 1e-6
_PROBED_POSITIONS = 256

Batch = dict[str, Tensor]
"""``tokens (B, T + max(horizons))``, and optionally ``document_ids`` and ``loss_mask`` of the same shape."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one head on a text, with teacher forcing.

    Attributes:
        horizon: Horizon of the head.
        loss: Mean loss in nats.
        top1: Top-1 accuracy.
        top5: Top-5 accuracy.
        most_frequent: Accuracy of the baseline that always predicts the most frequent target.
        count: Number of targets.
    """

    horizon: int
    loss: float
    top1: float
    top5: float
    most_frequent: float
    count: int

    @property
    def beats_baseline(self) -> bool:
        """Whether the top-1 accuracy exceeds the baseline by more than two standard errors."""
        error = (self.most_frequent * (1 - self.most_frequent) / max(self.count, 1)) ** 0.5
        return self.top1 > self.most_frequent + 2 * error


@torch.inference_mode()
def accuracies(model: MTPModel, batches: Sequence[Batch]) -> list[Accuracy]:
    """Measure every head on batches of text, as validation does.

    Args:
        model: A model in evaluation mode.
        batches: Batches of held-out text.
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
    most_frequent = tokens_seen.amax(dim=1) / total.clamp(min=1)
    return [
        Accuracy(
            horizon=horizon,
            loss=found[f"loss/head_{index + 1}"].item(),
            top1=found[f"accuracy/head_{index + 1}"].item(),
            top5=found[f"top5_accuracy/head_{index + 1}"].item(),
            most_frequent=most_frequent[index].item(),
            count=int(total[index]),
        )
        for index, horizon in enumerate(model.horizons)
    ]


@torch.inference_mode()
def heads_without_input(model: MTPModel, batch: Batch) -> list[int]:
    """Return the horizons whose distribution is the same at every position, whatever the input.

    Args:
        model: A model in evaluation mode.
        batch: Text that differs between positions.
    """
    states = model(batch.get("inputs", batch["tokens"]), document_ids=batch.get("document_ids"))
    constant = []
    for index, horizon in enumerate(model.horizons):
        logits = marginal_logits(states, index, model.unembedding.logits, _PROBED_POSITIONS)
        probs = logits.double().softmax(dim=-1)
        if (probs.amax(dim=0) - probs.amin(dim=0)).max() < _CONSTANT:
            constant.append(horizon)
    return constant


def untouched_parameters(heads: nn.Module) -> list[str]:
    """Return the names of parameters that still have their initial value.

    Only parameters without random initialisation can be detected: gains, biases, matrices of zeros. Rows of a matrix
    are named separately, because they may belong to different heads.

    Args:
        heads: Heads whose modules initialise their parameters in ``reset_parameters``.
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

    Below 0 the gradients of the head and of the next token conflict. See
    :class:`~mtp_modules.training.monitoring.GradientConflict`.

    Args:
        model: Trunk, heads and unembedding. Its parameters and their gradients do not change.
        batch: A batch of text.

    Returns:
        One cosine per horizon; ``None`` for horizon 1.
    """
    loss, size = MultiTokenLoss(), len(model.horizons)
    parameters = list(model.trunk.parameters())
    needed = [parameter.requires_grad for parameter in parameters]
    training = model.training

    def gradient(index: int) -> tuple[Tensor, ...]:
        weights = [float(place == index) for place in range(size)]
        terms = loss(model, **batch, weights=weights)
        return torch.autograd.grad(terms.loss, parameters, allow_unused=True, materialize_grads=True)

    model.train()  # recurrent GPU kernels have a backward pass in training mode only
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        near = gradient(0)
        return [None, *(gradient_conflict(near, gradient(index))[0].item() for index in range(1, size))]
    finally:
        model.train(training)
        for parameter, before in zip(parameters, needed, strict=True):
            parameter.requires_grad_(before)
