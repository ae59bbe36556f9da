"""The output matrices, in one module, so that hooks of DDP and FSDP2 see every use of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import is_distributed, refuse
from mtp_modules.core.objective import CrossEntropyTerms, LinearCrossEntropy, OutputMatrix, Teacher
from mtp_modules.core.shapes import Float, Int, Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Unembedding(nn.Module):
    """Turn states into logits, or straight into a loss.

    Args:
        d_model: Width ``D`` of a state.
        vocab_size: Number ``V`` of token ids.
        tied_to: Embedding whose weight is horizon 1's output matrix; a matrix of its own if ``None``.
        bias: Add a bias to the logits.
        num_own: How many horizons beyond the first have an output matrix of their own; if 0, all use horizon 1's.
        trained: What all matrices and biases start from. Horizon 1's is this very tensor, unless it is tied to another.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        tied_to: nn.Embedding | None = None,
        bias: bool = False,
        num_own: int = 0,
        trained: OutputMatrix | None = None,
    ) -> None:
        super().__init__()
        self.tied = tied_to is not None
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model)) if tied_to is None else tied_to.weight
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None
        self.own_weights = nn.ParameterList(torch.empty(vocab_size, d_model) for _ in range(num_own))
        self.own_biases = nn.ParameterList(torch.empty(vocab_size) for _ in range(num_own if bias else 0))
        self.reset_parameters()
        if trained is not None:
            self._start_from(trained)

    def _start_from(self, trained: OutputMatrix) -> None:
        if not self.tied:
            self.weight = nn.Parameter(trained.weight)  # shares its memory
        with torch.no_grad():
            for weight in self.own_weights:
                weight.copy_(trained.weight)
            if trained.bias is not None:
                for bias in (*(() if self.bias is None else (self.bias,)), *self.own_biases):
                    bias.copy_(trained.bias)

    def reset_parameters(self) -> None:
        """Draw the matrices with variance 1/D, but not one that the embedding owns; biases are 0."""
        for weight in (*(() if self.tied else (self.weight,)), *self.own_weights):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in (*(() if self.bias is None else (self.bias,)), *self.own_biases):
            nn.init.zeros_(bias)

    def matrix(self, horizon_index: int) -> OutputMatrix:
        """Return the output matrix of one horizon.

        Args:
            horizon_index: 0 for horizon 1.
        """
        if horizon_index == 0 or len(self.own_weights) == 0:
            return OutputMatrix(self.weight, self.bias)
        bias = self.own_biases[horizon_index - 1] if len(self.own_biases) else None
        return OutputMatrix(self.own_weights[horizon_index - 1], bias)

    def forward(
        self,
        states: Float[Tensor, "N D"],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        backend: LinearCrossEntropy,
        teacher: Teacher | None = None,
        *,
        sizes: Sequence[int],
        detach_far: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Linear + cross-entropy, as the backend does it.

        Args:
            states: What the heads made, head by head.
            targets: Token to predict.
            example_weights: Factor of each example in the loss.
            backend: How to compute it.
            teacher: Share the loss with this law.
            sizes: How many examples each horizon has.
            detach_far: Train the output matrix by horizon 1 alone.
            label_smoothing: See :class:`~mtp_modules.core.objective.LinearCrossEntropy`.
            z_loss: See there too.

        Raises:
            ValueError: If ``detach_far`` would leave matrices without any training.
        """
        matrices = [self.matrix(index) for index in range(len(sizes))]
        if detach_far and len(sizes) > 1:
            if len(self.own_weights):
                refuse(
                    self,
                    "detach_far would leave the output matrices of the horizons beyond the first untrained; "
                    "set it to false, for they give horizon 1's matrix no gradient anyway.",
                )
            far = OutputMatrix(self.weight.detach(), None if self.bias is None else self.bias.detach())
            matrices[1:] = [far] * (len(sizes) - 1)
        return backend(
            states,
            matrices,
            sizes,
            targets,
            example_weights,
            teacher,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

    def logits(self, states: Float[Tensor, "*N D"], horizon_index: int = 0) -> Float[Tensor, "*N V"]:
        """Return the logits of one horizon; gathered, where the matrix is sharded over the vocabulary.

        Args:
            states: What its head made.
            horizon_index: 0 for horizon 1.
        """
        weight, bias = self.matrix(horizon_index)
        if not is_distributed(weight):
            return F.linear(states, weight, bias)
        from torch.distributed.tensor import DTensor, Replicate  # takes a second, so only where it is in use

        mesh = cast("DTensor", weight).device_mesh
        whole = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
        gathered: Tensor = cast("DTensor", F.linear(whole, weight, bias)).full_tensor()
        return gathered
