"""Predictions of every horizon at every position of a batch."""

from collections.abc import Mapping

import torch

from mtp_modules.core.mixture import marginal_logits
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.model import MTPModel


def most_likely(model: MTPModel, batch: Mapping[str, Tensor]) -> Int[Tensor, "B T H"]:
    """Return the most likely token of every horizon at every position.

    Args:
        model: The model.
        batch: With ``tokens``, and optionally ``inputs`` and ``document_ids``.
    """
    states = model(batch.get("inputs", batch["tokens"]), document_ids=batch.get("document_ids"))
    unembed, shape = model.unembedding.logits, states[0].shape[:2]
    each = [marginal_logits(states, index, unembed).argmax(dim=-1) for index in range(len(model.horizons))]
    return torch.stack(each, dim=-1).view(*shape, -1)
