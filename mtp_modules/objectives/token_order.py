"""TOP: the order in which tokens will come."""

import torch
from torch import nn

from mtp_modules.core.auxiliary import AuxiliaryObjective, AuxiliaryTerms, AuxiliaryText
from mtp_modules.core.checks import whole
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.trunk import TrunkOutput
from mtp_modules.objectives.sparse import SparseTargets, first_occurrences, sparse_terms

_FARTHEST = 40
"""Beyond it, masses are below the rounding of float64."""


class TokenOrder(AuxiliaryObjective):
    r"""Rank the tokens of the vocabulary by how soon they will come.

    A token that next occurs ``d`` places ahead gets the score ``window - d``, one that does not occur in the window
    none. The softmax of the scores is the target of a cross-entropy (ListNet's), for which there is an output matrix of
    its own:

    .. math:: L_t = -\sum_v \frac{e^{-d_{t,v}}}{\sum_u e^{-d_{t,u}}} \log \mathrm{softmax}(U h_t)_v

    Zuhri et al. 2025 (arXiv 2508.19228), token order prediction. The scores fall so fast that a few tokens have all of
    the mass, so no score of the others is ever made. Occurrences in another document do not count.

    Args:
        d_model: Width ``D`` of the trunk's states.
        vocab_size: Number ``V`` of token ids.
        window: How far to look.
        weight: Factor of the mean loss; 1 in the paper.

    Logs ``loss`` and ``accuracy``, how often the first in the ranking is the next token.

    Raises:
        ValueError: If a size is below 1, or the weight negative.

    Example:
        >>> objective = TokenOrder(d_model=16, vocab_size=50)
        >>> text = AuxiliaryText(torch.randint(50, (2, 12)), length=9)
        >>> terms = objective(TrunkOutput(torch.zeros(2, 9, 16)), text)
        >>> int(terms.examples), bool(terms.loss.isclose(torch.tensor(50.0).log()))
        (18, True)
    """

    name = "token_order"
    figures = ("loss", "accuracy")

    def __init__(self, *, d_model: int, vocab_size: int, window: int = 128, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.d_model, self.vocab_size = whole(self, "d_model", d_model, 1), whole(self, "vocab_size", vocab_size, 1)
        self.window = min(whole(self, "window", window, 1), _FARTHEST)
        self.unembedding = nn.Linear(d_model, vocab_size, bias=False)

    def flops(self, length: int) -> int:
        """Return the operations of the output matrix."""
        return 2 * length * self.d_model * self.vocab_size

    def count(self, text: AuxiliaryText) -> Int[Tensor, ""]:
        """Return how many positions have a token to come."""
        return text.upcoming(self.window)[1].any(dim=2).sum()

    def forward(
        self, output: TrunkOutput, text: AuxiliaryText, *, count: Int[Tensor, ""] | None = None
    ) -> AuxiliaryTerms:
        """Score a batch; see the contract."""
        tokens, valid = text.upcoming(self.window)
        distances = torch.arange(self.window, dtype=torch.float64, device=tokens.device)
        mass = torch.where(first_occurrences(tokens, valid), torch.exp(-distances), 0.0)
        mass = mass / mass.sum(dim=2, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
        there = valid.any(dim=2)
        examples = there.sum()
        found = sparse_terms(
            output.hidden.flatten(0, 1),
            self.unembedding.weight,
            SparseTargets(tokens.clamp(min=0).flatten(0, 1), mass.flatten(0, 1)),
            (there * self.scale(examples, count)).flatten(),
        )
        right = (found.predicted.view_as(there) == tokens[:, :, 0]) & valid[:, :, 0]
        sums = {"loss": torch.where(there.flatten(), found.each, 0.0).double().sum(), "accuracy": right.double().sum()}
        return AuxiliaryTerms(found.loss, sums, examples)
