"""What objectives share that predict which tokens are in a bag."""

from abc import abstractmethod

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.auxiliary import AuxiliaryObjective, AuxiliaryTerms, AuxiliaryText
from mtp_modules.core.checks import refuse, whole
from mtp_modules.core.shapes import Bool, Int, Tensor
from mtp_modules.core.trunk import TrunkOutput
from mtp_modules.objectives.sparse import SparseTargets, first_occurrences, sparse_terms


class BagObjective(AuxiliaryObjective):
    r"""Predict which tokens are in the bag of each position, in any order.

    A residual layer of its own turns the trunk's state into that of a summary, an output matrix of its own into one
    logit for each token, and each is a binary cross-entropy, weighted by how much the token says:

    .. math:: L_t = \frac{1}{\sum_v w_v} \sum_v w_v \bigl[\mathrm{softplus}(z_v) - a_{t,v} z_v\bigr], \quad
              w_v = \log \frac{n}{n_v}

    with :math:`a_{t,v} = 1` if :math:`v` is in the bag, and :math:`n_v` of the :math:`n` tokens of the training data
    being :math:`v` (1 at least).

    Args:
        d_model: Width ``D`` of the trunk's states.
        vocab_size: Number ``V`` of token ids.
        weighted: Weigh tokens by their rarity; without, all alike.
        weight: Factor of the mean loss.

    Logs ``loss``, and ``recall``: the share of bags whose most likely token is in them.
    """

    figures = ("loss", "recall")
    token_weights: Tensor

    def __init__(self, *, d_model: int, vocab_size: int, weighted: bool = True, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.d_model, self.vocab_size = whole(self, "d_model", d_model, 1), whole(self, "vocab_size", vocab_size, 1)
        self.reads_frequencies = weighted
        self.summary = nn.Linear(d_model, d_model)
        self.unembedding = nn.Linear(d_model, vocab_size, bias=False)
        unknown = torch.full((vocab_size,), torch.nan if weighted else 1 / vocab_size)
        self.register_buffer("token_weights", unknown)

    @abstractmethod
    def upcoming(self, text: AuxiliaryText) -> tuple[Int[Tensor, "B T W"], Bool[Tensor, "B T W"]]:
        """Return tokens behind each position, and which of them are in its bag; one may repeat.

        Args:
            text: Of the batch.
        """

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
        return self.upcoming(text)[1].any(dim=2).sum()

    def forward(
        self, output: TrunkOutput, text: AuxiliaryText, *, count: Int[Tensor, ""] | None = None
    ) -> AuxiliaryTerms:
        """Score a batch; see the contract."""
        if self.reads_frequencies and self.token_weights.isnan().any():
            refuse(
                self,
                "weighted is true, but the frequencies of tokens are unknown; call prepare_objectives(module, data) of "
                "mtp_modules.training before the fit, or set weighted to false.",
            )
        tokens, valid = self.upcoming(text)
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
