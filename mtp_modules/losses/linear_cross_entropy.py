"""Backends of the one operation that MTP training spends its memory on: output matrix + cross-entropy."""

import torch
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.interfaces import CrossEntropyTerms, LinearCrossEntropy, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor


class NaiveLinearCrossEntropy(LinearCrossEntropy):
    """Hold all logits: the plainest way, and the oracle that every other backend is tested against.

    Memory grows with ``N * V``. Fine for bytes; use another backend for a real vocabulary.
    """

    def __call__(
        self,
        states: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and what metrics need; see the interface."""
        logits = F.linear(states, weight, bias)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        counts = targets >= 0
        targets = targets.clamp(min=0)
        nll = F.cross_entropy(logits, targets, reduction="none")
        example_loss = nll
        if teacher is not None:
            with torch.no_grad():
                law = F.linear(teacher.states, weight, bias).to(logits.dtype).softmax(dim=-1)
            example_loss = torch.lerp(nll, F.cross_entropy(logits, law, reduction="none"), teacher.share.to(nll.dtype))
        with torch.no_grad():
            own = logits.gather(1, targets[:, None])
            rank = (logits > own).sum(dim=1)
            predicted = logits.argmax(dim=1)
        loss = torch.where(counts, example_loss * example_weights, 0.0).sum()
        return CrossEntropyTerms(loss, torch.where(counts, nll.detach(), 0.0), rank, predicted)
