"""The output matrix, in one module, so that hooks of DDP and FSDP2 see every use of it."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.interfaces import CrossEntropyTerms, LinearCrossEntropy, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor


class Unembedding(nn.Module):
    """Turn states into logits, or straight into a loss.

    Args:
        d_model: Width ``D`` of a state.
        vocab_size: Number ``V`` of token ids.
        tied_to: Embedding whose weight this module shares; a matrix of its own if ``None``.
    """

    def __init__(self, d_model: int, vocab_size: int, *, tied_to: nn.Embedding | None = None) -> None:
        super().__init__()
        self.tied = tied_to is not None
        if tied_to is not None:
            self.weight = tied_to.weight
        else:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrix with variance 1/D, unless the embedding owns it."""
        if not self.tied:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(
        self,
        states: Float[Tensor, "N D"],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        backend: LinearCrossEntropy,
        teacher: Teacher | None = None,
    ) -> CrossEntropyTerms:
        """Linear + cross-entropy, as the backend does it.

        Args:
            states: What the heads made.
            targets: Token to predict.
            example_weights: Factor of each example in the loss.
            backend: How to compute it.
            teacher: Share the loss with this law.
        """
        return backend(states, self.weight, None, targets, example_weights, teacher)

    def logits(self, states: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Return logits, for decoding.

        Args:
            states: What the heads made.
        """
        return F.linear(states, self.weight)
