"""The contract of auxiliary objectives: what else training may ask of the trunk's states."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import at_least, finite
from mtp_modules.core.component import Component
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.core.targets import future_targets
from mtp_modules.core.trunk import TrunkOutput


@dataclass(frozen=True)
class AuxiliaryText:
    """The text of a batch, as an objective sees it.

    Attributes:
        tokens: ``(B, L)``, targets; negative where there is none.
        length: Number ``T`` of positions that the trunk reads.
        document_ids: ``(B, L)``, the document of every token; ``None`` if each row is one.
        loss_mask: ``(B, L)``, false at tokens that are no targets; ``None`` if all are.
    """

    tokens: Int[Tensor, "B L"]
    length: int
    document_ids: Int[Tensor, "B L"] | None = None
    loss_mask: Bool[Tensor, "B L"] | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], lookahead: int) -> "AuxiliaryText":
        """Return the text of a training batch.

        Args:
            batch: With ``tokens``, and optionally ``document_ids`` and ``loss_mask``.
            lookahead: How many tokens it carries beyond the positions that the trunk reads.
        """
        tokens = batch["tokens"]
        return cls(tokens, tokens.shape[1] - lookahead, batch.get("document_ids"), batch.get("loss_mask"))

    def upcoming(self, window: int, *, first: int = 1) -> tuple[Int[Tensor, "B T W"], Bool[Tensor, "B T W"]]:
        """Return the tokens that follow each position, and which of them are targets: those of the same document.

        Args:
            window: How far to look, up to ``t + window``; a row may end before.
            first: Distance of the nearest.
        """
        missing = self.length + window - self.tokens.shape[1]

        def padded(part: Tensor | None, value: int) -> Tensor | None:
            return None if part is None else F.pad(part, (0, missing), value=value)

        tokens = padded(self.tokens, -100)
        assert tokens is not None
        mask = None if self.loss_mask is None else padded(self.loss_mask.bool(), 0)
        return future_targets(tokens, range(first, window + 1), padded(self.document_ids, -1), mask)


class AuxiliaryTerms(NamedTuple):
    """Result of an objective.

    Attributes:
        loss: Weighted loss of the batch, as a part of the mean of the optimizer step; the only part with gradients.
        sums: What is logged, added up over the examples of the batch; each divided by their number in the end.
        examples: How many the batch has.
    """

    loss: Float[Tensor, ""]
    sums: dict[str, Float[Tensor, ""]]
    examples: Int[Tensor, ""]


class AuxiliaryObjective(Component, nn.Module, ABC):
    """A loss of its own on the trunk's states, beside that of the horizons; not needed in decoding.

    A final class has its parameters in itself, not in the model: what is saved for decoding does not have them.
    Examples of a batch are counted from its text alone, so that a step that is spread over processes and batches can
    be normalised by the number of all its examples before any of them is scored.

    Args:
        weight: Factor of the mean loss of the examples.

    Attributes:
        name: Of the figures in logs: ``train/<name>/loss`` and so on.
        figures: Names of what is logged.
        reads_frequencies: Whether :meth:`set_frequencies` must be called before training.
        reads_vocabulary: Whether :meth:`set_vocabulary` must be.
    """

    name: str
    figures: tuple[str, ...] = ("loss",)
    reads_frequencies: bool = False
    reads_vocabulary: bool = False

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        at_least(self, "weight", weight, 0)
        self.weight = finite(self, "weight", weight, 0)

    @abstractmethod
    def count(self, text: AuxiliaryText) -> Int[Tensor, ""]:
        """Return how many examples a batch has.

        Args:
            text: Of the batch.
        """

    @abstractmethod
    def forward(
        self, output: TrunkOutput, text: AuxiliaryText, *, count: Int[Tensor, ""] | None = None
    ) -> AuxiliaryTerms:
        """Score a batch.

        Args:
            output: The trunk's states, ``(B, T, D)``.
            text: Of the batch.
            count: Examples of the whole optimizer step; only those of the batch if ``None``.
        """

    @abstractmethod
    def flops(self, length: int) -> int:
        """Return the floating-point operations of ``forward`` for a row; see :meth:`~mtp_modules.Trunk.flops`.

        Args:
            length: Number ``T`` of positions.
        """

    def set_frequencies(self, counts: Int[Tensor, " V"]) -> None:
        """Learn how often each token occurs in the training data, before training.

        Args:
            counts: Of each token id.
        """
        return

    def set_vocabulary(self, texts: Sequence[str]) -> None:
        """Learn the text of each token, before training.

        Args:
            texts: Of each token id.
        """
        return

    def scale(self, examples: Int[Tensor, ""], count: Tensor | None) -> Float[Tensor, ""]:
        """Return the factor of each example in the loss.

        Args:
            examples: Those of the batch.
            count: Those of the optimizer step; only this batch if ``None``.
        """
        total = examples if count is None else count
        return self.weight / total.clamp(min=1).to(torch.float64)
