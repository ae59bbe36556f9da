"""Exact-match accuracy of answers."""

import torch
from torchmetrics import Metric

from mtp_modules.core.checks import refuse
from mtp_modules.core.outputs import LossTerms
from mtp_modules.core.shapes import Bool, Int, Tensor


def answer_counts(terms: LossTerms, answer_mask: Bool[Tensor, "B T"]) -> Int[Tensor, " 4"]:
    """Count rows with a completely right answer, rows with an answer, right answer tokens, and answer tokens.

    Args:
        terms: Of one batch, with every position (``P = T``).
        answer_mask: True at position ``t`` if its target, the token at ``t + 1``, is part of the row's answer.

    Raises:
        ValueError: If the mask has another shape than the positions.
    """
    if answer_mask.shape != terms.rank.shape[:2]:
        refuse(
            "answer_mask",
            f"must have one entry per position, {tuple(terms.rank.shape[:2])}, got {tuple(answer_mask.shape)}; entry t "
            "marks whether the token at t + 1 is part of the answer.",
        )
    counted = answer_mask & terms.valid[:, :, 0]
    right = (terms.rank[:, :, 0] == 0) & counted
    asked = counted.any(dim=1)
    whole = asked & (right == counted).all(dim=1)
    return torch.stack((whole.sum(), asked.sum(), right.sum(), counted.sum()))


class AnswerAccuracy(Metric):
    """Greedy exact match, from one forward pass.

    A row is right if horizon 1's argmax is the true token at every token of its answer. Given a right prefix, greedy
    decoding takes the same argmax, so it returns the whole answer exactly where the row is right.

    ``compute`` returns ``answer/exact``, the share of rows with an answer that are completely right, and
    ``answer/tokens``, the share of answer tokens that are right given the true ones before. Without any answer it
    returns an empty dictionary.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(4, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, terms: LossTerms, answer_mask: Bool[Tensor, "B T"]) -> None:
        """Add the counts of a batch.

        Args:
            terms: Result of the loss in evaluation.
            answer_mask: Which targets of horizon 1 are part of an answer; see :func:`answer_counts`.
        """
        self.counts = self.counts + answer_counts(terms, answer_mask)

    def compute(self) -> dict[str, Tensor]:
        """Return both shares under their keys."""
        whole, rows, right, tokens = self.counts.double()
        return {"answer/exact": whole / rows, "answer/tokens": right / tokens} if rows > 0 else {}
