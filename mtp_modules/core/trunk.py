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
        hidden: ``(B, T, D)``, the input of the heads.
        features: Hidden states of the inner layers in :attr:`Trunk.feature_layers`, shallow to deep.
    """

    hidden: Float[Tensor, "B T D"]
    features: tuple[Float[Tensor, "B T D"], ...] = ()


class Trunk(Component, nn.Module, ABC):
    """Turns tokens into hidden states, causally: position ``t`` sees tokens up to and including ``t``.

    Attributes:
        d_model: Width ``D`` of the hidden states.
        vocab_size: Number ``V`` of token ids.
        max_positions: Maximum sequence length, or ``None`` if there is no limit.
        embedding: Module that embeds token ids, ``(...)`` to ``(..., embedding_width)``. Heads that read drafted tokens
            and a tied unembedding use it too.
        embedding_width: Width of the embedding, usually ``D``.
        supports_trees: Whether a chunk may be a tree of drafts.
        feature_layers: Layers, counted from 0 and ascending, whose outputs every forward pass returns as
            :attr:`TrunkOutput.features`, for heads that read them; may be empty.
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
        """Repeated modules to shard, compile or recompute one by one; training calls only their ``forward``."""
        return ()

    @abstractmethod
    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        state: DecodingState | None = None,
    ) -> TrunkOutput:
        """Compute the hidden states of tokens.

        Args:
            tokens: Token ids.
            document_ids: The document of every token; nothing carries over from one document to the next. Not
                allowed together with ``state``.
            state: Append the tokens as a chunk to this state, instead of starting from an empty one.

        Shape:
            tokens ``(B, T)`` -> hidden ``(B, T, D)``.
        """

    def read(self, tokens: Int[Tensor, "B T"], state: DecodingState) -> TrunkOutput:
        """Append a chunk that ``state.begin`` has announced: ``forward`` without its CPU-side bookkeeping.

        A trunk that implements it with tensor operations only can be compiled for decoding.

        Args:
            tokens: The chunk.
            state: State of this trunk after ``begin``.

        Raises:
            ValueError: If this trunk does not implement it.
        """
        refuse(self, "cannot be compiled for decoding: it has no read(tokens, state); use the uncompiled model.")

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
            capacity: Maximum tokens per row, the provisional chunk included.
        """

    @abstractmethod
    def flops(self, length: int) -> int:
        """Return the floating-point operations of a forward pass over one sequence of ``length`` tokens.

        Counts matrix products only, and all of attention even under a causal mask (PaLM, arXiv 2204.02311, appendix B).
        """
