"""FSP: a summary of what will come, as a bag of words."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.auxiliary import AuxiliaryObjective, AuxiliaryTerms, AuxiliaryText
from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.shapes import Int, Tensor
from mtp_modules.core.trunk import TrunkOutput
from mtp_modules.objectives.sparse import SparseTargets, first_occurrences, sparse_terms


class FutureBagOfWords(AuxiliaryObjective):
    r"""Predict which tokens will occur from the one after the next on, in any order.

    A residual layer of its own turns the trunk's state into that of a summary, an output matrix of its own into one
    logit for each token, and each is a binary cross-entropy, weighted by how much the token says:

    .. math:: L_t = \frac{1}{\sum_v w_v} \sum_v w_v \bigl[\mathrm{softplus}(z_v) - a_{t,v} z_v\bigr], \quad
              w_v = \log \frac{n}{n_v}

    with :math:`a_{t,v} = 1` if :math:`v \in x_{t+2..t+\tau}`, and :math:`n_v` of the :math:`n` tokens of the training
    data being :math:`v` (1 at least). Future summary prediction, Mahajan et al. 2025 (arXiv 2510.14751), its variant
    with a bag of words. Tokens of another document do not count, and windows end with the document or the row.

    Args:
        d_model: Width ``D`` of the trunk's states.
        vocab_size: Number ``V`` of token ids.
        window: The farthest token :math:`\tau` of the bag; 12 and 100 in the paper.
        weighted: Weigh tokens by their rarity; without, all alike.
        weight: Factor of the mean loss.

    Logs ``loss``, and ``recall``: the share of bags whose most likely token is in them.

    Raises:
        ValueError: If a size is too small, or the weight negative; in training, if ``weighted`` and the frequencies are
            unknown, because :func:`~mtp_modules.training.count_frequencies` was not called.

    Example:
        >>> objective = FutureBagOfWords(d_model=16, vocab_size=50, weighted=False)
        >>> text = AuxiliaryText(torch.randint(50, (2, 12)), length=9)
        >>> terms = objective(TrunkOutput(torch.zeros(2, 9, 16)), text)
        >>> int(terms.examples), bool(terms.loss > 0)
        (18, True)
    """

    name = "future_bag"
    figures = ("loss", "recall")
    token_weights: Tensor

    def __init__(
        self, *, d_model: int, vocab_size: int, window: int = 12, weighted: bool = True, weight: float = 1.0
    ) -> None:
        super().__init__(weight=weight)
        self.d_model, self.vocab_size = whole(self, "d_model", d_model, 1), whole(self, "vocab_size", vocab_size, 1)
        self.window, self.reads_frequencies = whole(self, "window", window, 2), weighted
        self.summary = nn.Linear(d_model, d_model)
        self.unembedding = nn.Linear(d_model, vocab_size, bias=False)
        unknown = torch.full((vocab_size,), torch.nan if weighted else 1 / vocab_size)
        self.register_buffer("token_weights", unknown)

    def set_frequencies(self, counts: Int[Tensor, " V"]) -> None:
        """Weigh tokens by their rarity in the training data.

        Raises:
            ValueError: If there is not one count for each token id.
        """
        if counts.shape != self.token_weights.shape:
            refuse(self, f"counts must hold {self.vocab_size} numbers, got shape {tuple(counts.shape)}.")
        counts = counts.double().clamp(min=1)
        rarity = torch.log(counts.sum() / counts)
        self.token_weights.copy_(rarity / rarity.sum())

    def flops(self, length: int) -> int:
        """Return the operations of the layer and the output matrix."""
        return 2 * length * self.d_model * (self.d_model + self.vocab_size)

    def count(self, text: AuxiliaryText) -> Int[Tensor, ""]:
        """Return how many positions have a bag that is not empty."""
        return text.upcoming(self.window, first=2)[1].any(dim=2).sum()

    def forward(
        self, output: TrunkOutput, text: AuxiliaryText, *, count: Int[Tensor, ""] | None = None
    ) -> AuxiliaryTerms:
        """Score a batch; see the contract."""
        if self.reads_frequencies and self.token_weights.isnan().any():
            refuse(
                self,
                "weighted is true, but the frequencies of tokens are unknown; call count_frequencies(module, data) of "
                "mtp_modules.training before the fit, or set weighted to false.",
            )
        tokens, valid = text.upcoming(self.window, first=2)
        bag = first_occurrences(tokens, valid)
        there = valid.any(dim=2)
        examples, ids = there.sum(), tokens.clamp(min=0).flatten(0, 1)
        states = output.hidden + F.silu(self.summary(output.hidden))
        found = sparse_terms(
            states.flatten(0, 1),
            self.unembedding.weight,
            SparseTargets(ids, bag.to(states.dtype).flatten(0, 1)),
            (there * self.scale(examples, count)).flatten(),
            token_weights=self.token_weights,
        )
        inside = ((ids == found.predicted[:, None]) & bag.flatten(0, 1)).any(dim=1)
        sums = {"loss": torch.where(there.flatten(), found.each, 0.0).double().sum(), "recall": inside.double().sum()}
        return AuxiliaryTerms(found.loss, sums, examples)
