"""The contracts of this package. Read this file first.

::

    tokens --> Trunk --> hidden --> Heads --> one state a horizon --> Unembedding --> MultiTokenLoss      (training)
                 ^                    |                                    |
                 |                    +-- Draft (tokens + their law q) ----+
                 +-- verify K+1 positions <-- Decoder: accept, rewind, emit                               (decoding)

A component is one of the abstract classes below, or of those of the loss in :mod:`mtp_modules.core.objective`, or a
final class that implements one. Letters are those of :mod:`mtp_modules.core.shapes`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.drafts import Draft, DraftChoice, LikeliestToken
from mtp_modules.core.objective import OutputMatrix
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.state import DecodingState as DecodingState
from mtp_modules.core.tokenizer import Tokenizer as Tokenizer


class TrunkOutput(NamedTuple):
    """What a trunk returns.

    Attributes:
        hidden: ``(B, T, D)``, ready for the heads.
        features: Hidden states of the inner layers that somebody asked for, shallow to deep; empty if nobody did.
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
        trained_output: The output matrix that the trunk was trained with, which the unembedding then starts from;
            ``None`` if there is none.
    """

    d_model: int
    vocab_size: int
    max_positions: int | None
    embedding: nn.Module
    embedding_width: int
    supports_trees: bool = False
    trained_output: OutputMatrix | None = None

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

    def read(self, tokens: Int[Tensor, "B T"], state: DecodingState) -> Float[Tensor, "B T D"]:
        """Append a chunk that ``state.begin`` has announced: ``forward`` with a state, less what is done on the host.

        A trunk that has it, in tensor operations only, can be compiled for decoding.

        Args:
            tokens: The chunk.
            state: Told of it.

        Raises:
            ValueError: If this trunk does not have it.
        """
        refuse(
            self, "cannot be compiled for decoding, for it has no read(tokens, state); decode with the model itself."
        )

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


class Heads(Component, nn.Module, ABC):
    """Turn the trunk's hidden state into one state a horizon. The unembedding turns states into logits.

    Law: the states that training sees equal the states that decoding sees for the same tokens.

    Attributes:
        d_model: Width ``D`` of the hidden state that they read.
        horizons: Offsets of the heads, ascending from 1.
        reads_future: Whether horizon ``h`` also sees the tokens at ``t + 1 .. t + h - 1`` (when
            decoding: the drafts so far).
        reads_every_token: Whether they do so at every position, wherever states are wanted, as heads do that attend to
            what they said before: ``future`` has all ``T`` positions then, and decoding passes the tokens of chunks.
    """

    d_model: int
    reads_future: bool = False
    reads_every_token: bool = False

    @property
    @abstractmethod
    def horizons(self) -> tuple[int, ...]:
        """Offsets of the heads, ascending from 1."""

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Repeated modules to shard, compile or recompute one by one; see :attr:`Trunk.blocks`."""
        return ()

    @abstractmethod
    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B P K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...]:
        """Return one state a horizon, for training.

        Args:
            hidden: What the trunk says of every position.
            far_hidden: The same, for horizons beyond the first, where they must give the trunk no gradient; ``hidden``
                if ``None``.
            future: Embeddings of the tokens between, ``K = max(horizons) - 1``; needed if ``reads_future``. At all
                positions, ``(B, T, K, E)``, if ``reads_every_token``.
            positions: Where horizons beyond the first are wanted; everywhere if ``None`` (then ``P = T``).
            document_ids: Which document every position belongs to.

        Shape:
            horizon 1: ``(B, T, D)``; every other horizon: ``(B, P, D)``.
        """

    @abstractmethod
    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the states of horizon 1 alone, those that ``forward`` returns first.

        Args:
            hidden: What the trunk says of every position.
            document_ids: Which document every position belongs to.
        """

    @abstractmethod
    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> DecodingState:
        """Make an empty state for decoding; see :meth:`Trunk.new_state`.

        Args:
            batch_size: Number ``B`` of rows.
            capacity: Most tokens that a row will hold, the provisional chunk included.
            for_drafts: False if only horizon 1 will be used, which spares the other heads their memory.
        """

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append a chunk that ``state.begin`` has announced: ``extend``, less what is done on the host.

        In tensor operations only, so that it can be compiled. Heads that cannot do so implement ``extend`` itself.

        Args:
            hidden: The trunk's output for the chunk.
            state: Told of it.
            tokens: The chunk; needed if ``reads_every_token``, unless the state is for no drafts.
            embed: Embeds token ids; needed with them.

        Raises:
            ValueError: If these heads do not have it.
        """
        refuse(self, "cannot be compiled for decoding, for they have no read(hidden, state); use the model itself.")

    def extend(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append a chunk of the trunk's hidden states and return the states of horizon 1, which verification needs.

        Args:
            hidden: The trunk's output for the chunk.
            state: Of these heads; ``commit`` it together with the trunk's.
            tokens: The chunk; needed if ``reads_every_token``, unless the state is for no drafts.
            embed: Embeds token ids; needed with them.
        """
        state.begin(hidden.shape[1])
        return self.read(hidden, state, tokens=tokens, embed=embed)

    @abstractmethod
    def draft_states(
        self,
        tokens: Int[Tensor, "B N"],
        state: DecodingState,
        *,
        depth: int,
        before: Float[Tensor, "B M D"] | None,
        parents: Int[Tensor, "B N"],
        embed: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "B _ D"]:
        """Return what the heads say of the token after each of ``tokens``, which are drafts or the token emitted last.

        Args:
            tokens: At ``depth`` 0 the token emitted last, ``(B, 1)``; then drafts at that depth, several in a tree.
            state: Of these heads, committed; drafts start from its last position.
            depth: How many drafts lie between the token emitted last and these tokens, they included.
            before: What was returned at the depth before; ``None`` at depth 0.
            parents: Which of ``before`` each token was drafted from.
            embed: Embeds token ids.

        Shape:
            One state a token, or a single one where it is the same for all.
        """

    def draft(
        self,
        token: Int[Tensor, " B"],
        state: DecodingState,
        *,
        num_drafts: int,
        embed: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor, int], Tensor],
        choose: DraftChoice | None = None,
    ) -> Draft:
        """Propose a chain of tokens that follow ``token``, by the horizons beyond the first.

        Args:
            token: The token emitted last, which the trunk has not read.
            state: Of these heads, committed; drafts start from its last position.
            num_drafts: How many tokens ``K`` to propose at most, at most ``max_drafts``.
            embed: Embeds token ids.
            unembed: Turns states ``(B, N, D)`` of the horizon with a given index into logits ``(B, N, V)``; called as
                ``unembed(states, index)``. Horizon 1 has index 0.
            choose: Chooses each draft, nearest first; the likeliest token if ``None``.

        Raises:
            ValueError: If ``num_drafts`` lies outside 1 .. ``max_drafts``.
        """
        self.check_num_drafts(num_drafts)
        choose = LikeliestToken() if choose is None else choose
        root = torch.zeros_like(token)[:, None]
        tokens, logits, before = [], [], None
        for depth in range(num_drafts):
            before = self.draft_states(token[:, None], state, depth=depth, before=before, parents=root, embed=embed)
            logits.append(unembed(before, min(depth + 1, len(self.horizons) - 1))[:, 0])
            token = choose(logits[-1])
            tokens.append(token)
            if choose.done:
                break
        return Draft(tokens=torch.stack(tokens, dim=1), logits=torch.stack(logits, dim=1))

    def check_num_drafts(self, num_drafts: int) -> None:
        """Refuse to draft nothing, or more than the heads can.

        Args:
            num_drafts: How many tokens one after the other are asked for.

        Raises:
            ValueError: If the number lies outside 1 .. ``max_drafts``.
        """
        if num_drafts < 1:
            refuse(self, f"num_drafts must be at least 1, got {num_drafts}.")
        if self.max_drafts is not None and num_drafts > self.max_drafts:
            refuse(
                self,
                f"num_drafts must lie in 1..{self.max_drafts} for {len(self.horizons)} horizons, got {num_drafts}.",
            )

    @abstractmethod
    def flops(self, length: int, num_far: int) -> int:
        """Return the same as :meth:`Trunk.flops`, with horizons beyond the first at ``num_far`` positions only.

        If ``num_far`` is 0, it is that of :meth:`first`.
        """

    @property
    def max_drafts(self) -> int | None:
        """How many tokens these heads can draft: one a horizon beyond the first. ``None`` if they can go on and on."""
        return len(self.horizons) - 1
