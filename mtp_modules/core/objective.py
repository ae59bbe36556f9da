"""The contracts of the loss: linear + cross-entropy as one operation, and how much each horizon counts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Float, Int, Tensor


class CrossEntropyTerms(NamedTuple):
    """What linear + cross-entropy returns for ``N`` examples.

    Attributes:
        loss: Weighted sum over the examples; the only part that carries gradients.
        nll: ``(N,)``, negative log-likelihood of the target in nats, unweighted, 0 where there is no target.
        rank: ``(N,)``, number of logits above the target's: 0 means that it would have been chosen.
        predicted: ``(N,)``, the token with the largest logit.
    """

    loss: Float[Tensor, ""]
    nll: Float[Tensor, " N"]
    rank: Int[Tensor, " N"]
    predicted: Int[Tensor, " N"]


class OutputMatrix(NamedTuple):
    """What turns states into logits: a matrix, and a bias if there is one."""

    weight: Float[Tensor, "V _"]
    bias: Float[Tensor, " V"] | None = None


@dataclass(frozen=True)
class Teacher:
    """A law to imitate in place of the observed token, for the last ``M`` of ``N`` examples.

    Nothing of it is trained.

    Attributes:
        states: ``(M, E)``, detached.
        share: ``(M,)`` in [0, 1], how much of each example's loss is imitation of the teacher.
        matrix: Turns its states into logits; horizon 1's output matrix if ``None``.
        temperature: Divides the logits of both laws where they are compared.
        total_variation: How much of the imitation is total variation, instead of cross-entropy against the law.
    """

    states: Float[Tensor, "M E"]
    share: Float[Tensor, " M"]
    matrix: OutputMatrix | None = None
    temperature: float = 1.0
    total_variation: float = 0.0


@dataclass(frozen=True)
class NextTokenLaw:
    """What another model says of the next token at every position, to be imitated.

    Attributes:
        states: ``(B, T, E)``, detached.
        matrix: Turns them into logits.
        share: In [0, 1], how much of the loss is imitation of this law.
        temperature: Divides the logits of both laws where they are compared.
    """

    states: Float[Tensor, "B T E"]
    matrix: OutputMatrix
    share: float
    temperature: float = 1.0


class LinearCrossEntropy(Component, ABC):
    """Output matrix and cross-entropy as one operation, so that a backend is free never to hold all logits.

    The examples come head by head: those of horizon 1, then those of the next horizon. The formula of the loss is that
    of :class:`~mtp_modules.losses.NaiveLinearCrossEntropy`.
    """

    @abstractmethod
    def __call__(
        self,
        states: Float[Tensor, "N D"],
        matrices: Sequence[OutputMatrix],
        sizes: Sequence[int],
        targets: Int[Tensor, " N"],
        example_weights: Float[Tensor, " N"],
        teacher: Teacher | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyTerms:
        """Return the weighted loss and what metrics need.

        Args:
            states: What the heads made, head by head.
            matrices: One a head. The same tensor may stand in several, and collects the gradients of all of them;
                where ``weight.detach()`` stands, those examples give the matrix no gradient.
            sizes: How many examples each head has; they sum to ``N``.
            targets: Token to predict; negative where there is none.
            example_weights: Factor of each example in the loss.
            teacher: Share the loss of the last examples between the observed token and this law.
            label_smoothing: Share of the loss that is spread evenly over the vocabulary.
            z_loss: Coefficient of the squared logarithm of the softmax's normaliser.
        """


class HorizonWeights(Component, ABC):
    """How much each horizon counts in the training loss.

    Attributes:
        changes: Whether the weights change over a run.
    """

    changes: bool = False

    @abstractmethod
    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight a horizon, nearest first.

        Args:
            num_horizons: Number ``H``.
            progress: Share of the run's optimizer steps that are behind, from 0 to 1.
        """
