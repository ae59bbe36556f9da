"""The contract of trunks; see :mod:`mtp_modules.core.interfaces`."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.objective import OutputMatrix
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.state import DecodingState


class TrunkOutput(NamedTuple):
    """What a trunk returns.

    Attributes:
        hidden: ``(B, T, D)``, ready for the heads.
        features: Hidden states of the inner layers that :attr:`Trunk.feature_layers` names, shallow to deep.
    """

    hidden: Float[Tensor, "B T D"]
    features: tuple[Float[Tensor, "B T D"], ...] = ()


class Trunk(Component, nn.Module, ABC):
    """Turns tokens into hidden states, causally: position ``t`` sees tokens up to and including ``t``.

    Attributes:
        d_model: Width ``D`` of the hidden state.
        vocab_size: Number ``V`` of token ids.
        max_positions: Longest sequence it can read, or ``None`` if there is no limit.
        embedding: Module that embeds token ids, ``(...)`` to ``(..., embedding_width)``. Heads that read drafted tokens
            and a tied unembedding use it too.
        embedding_width: Its width, usually ``D``.
        supports_trees: Whether a chunk may be a tree of drafts.
        feature_layers: Layers, counted from 0 and ascending, whose outputs every reading returns as
            :attr:`TrunkOutput.features`, for heads that ask for them; empty if none is wanted.
    """

    d_model: int
    vocab_size: int
    max_positions: int | None
    embedding: nn.Module
    embedding_width: int
    supports_trees: bool = False
    feature_layers: tuple[int, ...] = ()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Repeated modules to shard, compile or recompute one by one; training uses each by its ``forward`` alone."""
        return ()

    @abstractmethod
    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        state: DecodingState | None = None,
    ) -> TrunkOutput:
        """Read tokens.

        Args:
            tokens: Token ids.
            document_ids: Which document every token belongs to; nothing is carried from one document to the next.
                Not with a state.
            state: Append the tokens as a chunk to what the state holds, instead of starting afresh.

        Shape:
            tokens ``(B, T)`` -> hidden ``(B, T, D)``.
        """

    def read(self, tokens: Int[Tensor, "B T"], state: DecodingState) -> TrunkOutput:
        """Append a chunk that ``state.begin`` has announced: ``forward`` with a state, less its CPU-side bookkeeping.

        A trunk that has it, in tensor operations only, can be compiled for decoding.

        Args:
            tokens: The chunk.
            state: Which ``begin`` has told of the chunk.

        Raises:
            ValueError: If this trunk does not have it.
        """
        refuse(
            self, "cannot be compiled for decoding, for it has no read(tokens, state); decode with the model itself."
        )

    def take_trained_output(self, *, tied: bool, bias: bool) -> OutputMatrix | None:
        """Hand over the output matrix that the trunk was trained with, and keep no reference to it.

        :class:`~mtp_modules.MTPModel` calls this once, when everything else fits, and its unembedding starts from the
        matrix. ``None`` if the trunk was trained with none.

        Args:
            tied: Whether the embedding shall be the output matrix.
            bias: Whether logits shall have a bias.

        Raises:
            ValueError: If a part of what the trunk was trained with would be lost, or was handed over before.
        """
        return None

    @abstractmethod
    def new_state(self, batch_size: int, capacity: int) -> DecodingState:
        """Make an empty state.

        Args:
            batch_size: Number ``B`` of rows.
            capacity: Most tokens that a row will hold, the provisional chunk included.
        """

    @abstractmethod
    def flops(self, length: int) -> int:
        """Return the floating-point operations of a forward pass over one sequence of ``length`` tokens.

        Matrix products only; attention in full, also where its mask is causal (PaLM, arXiv 2204.02311, appendix B).
        """
