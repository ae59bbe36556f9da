"""The contracts of the loss: linear + cross-entropy as one operation, and the weight of each horizon."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Bool, Float, Int, Tensor


class CrossEntropyTerms(NamedTuple):
    """Result of linear + cross-entropy for ``N`` examples.

    Attributes:
        loss: Weighted sum over the examples; the only part that carries gradients.
        nll: ``(N,)``, negative log-likelihood of the target in nats, unweighted, 0 if there is no target.
        rank: ``(N,)``, number of logits above the target's; 0 if the target is the argmax.
        predicted: ``(N,)``, the argmax.
        distance: ``(N,)``, total variation distance to the teacher's distribution, 0 without one; ``None`` unless it
            has a share in the loss.
    """

    loss: Float[Tensor, ""]
    nll: Float[Tensor, " N"]
    rank: Int[Tensor, " N"]
    predicted: Int[Tensor, " N"]
    distance: Float[Tensor, " N"] | None = None


class OutputMatrix(NamedTuple):
    """Output matrix, which turns states into logits, and an optional bias."""

    weight: Float[Tensor, "V _"]
    bias: Float[Tensor, " V"] | None = None


@dataclass(frozen=True)
class Teacher:
    """Soft targets for distillation: a distribution per example, for the last ``M`` of ``N`` examples.

    The teacher is not trained.

    Attributes:
        states: ``(M, E)``, detached.
        share: ``(M,)`` in [0, 1], the share of distillation in each example's loss.
        matrix: Output matrix for these states; horizon 1's if ``None``.
        temperature: Divides the logits of teacher and student in the distillation loss.
        total_variation: Share of the distillation loss that is total variation distance instead of cross-entropy.
        log_acceptance: In that share, minus the logarithm of the acceptance, 1 minus the distance, instead.
        lk_eta: If above 0, that share of an example is multiplied by ``1 - exp(-lk_eta * acceptance)``.
    """

    states: Float[Tensor, "M E"]
    share: Float[Tensor, " M"]
    matrix: OutputMatrix | None = None
    temperature: float = 1.0
    total_variation: float = 0.0
    log_acceptance: bool = False
    lk_eta: float = 0.0


@dataclass(frozen=True)
class NextTokenTeacher:
    """Another model's next-token distribution at every position, for distillation.

    Attributes:
        states: ``(B, T, E)``, detached.
        matrix: Output matrix for these states.
        share: In [0, 1], the share of distillation in the loss.
        temperature: Divides the logits of teacher and student in the distillation loss.
    """

    states: Float[Tensor, "B T E"]
    matrix: OutputMatrix
    share: float
    temperature: float = 1.0


class LinearCrossEntropy(Component, ABC):
    """Output matrix and cross-entropy as one operation, so that a backend need not materialise all logits.

    The examples come head by head: those of horizon 1, then those of the next horizon.
    :class:`~mtp_modules.losses.NaiveLinearCrossEntropy` defines the formula of the loss.
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
        """Return the weighted loss and the values that metrics need.

        Args:
            states: States of the heads, head by head.
            matrices: One per head. Several heads may have the same tensor, which then accumulates the gradients of
                all of them; examples of a head with ``weight.detach()`` give the matrix no gradient.
            sizes: How many examples each head has; they sum to ``N``.
            targets: Token to predict; negative if there is none.
            example_weights: Factor of each example in the loss.
            teacher: Distribution to imitate in a share of the loss of the last examples.
            label_smoothing: Share of the loss that is spread evenly over the vocabulary.
            z_loss: Coefficient of the squared logarithm of the softmax's normaliser.
        """


@runtime_checkable
class OutputLayer(Protocol):
    """What the loss asks of an output layer; :class:`~mtp_modules.core.unembedding.Unembedding` is one."""

    def matrix(self, horizon_index: int) -> OutputMatrix | None:
        """Return the output matrix of one horizon; ``None`` if its states are logits."""

    def draftable(self, tokens: Int[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        """Return whether horizons beyond the first score each token."""

    def __call__(
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
        """Score states."""


class HorizonWeights(Component, ABC):
    """Weight of each horizon in the training loss.

    Attributes:
        changes: Whether the weights change over a run.
    """

    changes: bool = False

    @abstractmethod
    def __call__(self, num_horizons: int, progress: float = 0.0) -> list[float]:
        """Return one weight per horizon, nearest first.

        Args:
            num_horizons: Number ``H``.
            progress: Share of the run's optimizer steps that are done, from 0 to 1.
        """
