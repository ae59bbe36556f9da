"""The loss of heads that predict whether their drafts are accepted."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.interfaces import Heads
from mtp_modules.core.objective import CrossEntropyTerms
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.losses.examples import Examples
from mtp_modules.losses.figures import agreement_by_horizon, comparable_by_horizon


def confidence_loss(
    heads: Heads,
    states: Sequence[Float[Tensor, "B _ _"]],
    terms: CrossEntropyTerms,
    examples: Examples,
    scale: Float[Tensor, " H"],
    *,
    overlap: bool,
) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of the predictions against the acceptance of the drafts.

    Each horizon's mean is over its valid targets, weighted like its other loss. Where horizon 1 has not read the text
    up to the target, nothing is added. DSpark 2026 (arXiv 2607.05147).

    Args:
        heads: Predict from their states, which get no gradient.
        states: Theirs, one per horizon.
        terms: Of all examples, with the argmax of each.
        examples: The examples.
        scale: Factor of one example of each horizon.
        overlap: Whether acceptance is that of a sampled draft, 1 minus the distance of the terms; otherwise it is that
            of greedy decoding, whether horizon 1 has the same argmax.
    """
    found = heads.confidence(torch.cat(tuple(states[1:]), dim=1).detach())  # one forward pass, also of a sharded module
    assert found is not None
    found = found.view(len(found), len(states) - 1, -1).transpose(1, 2).to(scale.dtype)
    if overlap:
        assert terms.distance is not None
        accepted, known = 1 - examples.near_far(terms.distance)[1], comparable_by_horizon(examples, heads.horizons)
    else:
        accepted, known = agreement_by_horizon(*examples.near_far(terms.predicted), examples, heads.horizons)
        accepted = accepted[:, :, 1:]
    accepted = accepted.to(scale.dtype)
    losses = F.binary_cross_entropy_with_logits(found, accepted, reduction="none")
    return (losses * known[:, :, 1:] * scale[1:]).sum()
