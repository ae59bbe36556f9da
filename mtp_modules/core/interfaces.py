"""The contracts of this package. Read this file first.

::

    tokens --> Trunk --> hidden --> Heads --> one state a horizon --> Unembedding --> MultiTokenLoss      (training)
                 ^                    |                                    |
                 |                    +-- Draft (tokens, their probs q) ---+
                 +-- verify K+1 positions <-- Decoder: accept, rewind, emit                               (decoding)

The contract of trunks is in :mod:`mtp_modules.core.trunk`, that of heads below.

A component is one of these abstract classes, or of those of the loss in :mod:`mtp_modules.core.objective`, or a
final class that implements one. Letters are those of :mod:`mtp_modules.core.shapes`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.component import Component
from mtp_modules.core.drafts import Draft, DraftSampler, GreedySampler
from mtp_modules.core.mixture import MixtureStates as MixtureStates
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.state import DecodingState as DecodingState
from mtp_modules.core.targets import horizon_of_draft
from mtp_modules.core.tokenizer import Tokenizer as Tokenizer
from mtp_modules.core.trunk import Trunk as Trunk
from mtp_modules.core.trunk import TrunkOutput as TrunkOutput


class Heads(Component, nn.Module, ABC):
    """Turn the trunk's hidden state into one state a horizon. The unembedding turns states into logits.

    Invariant: the states that training sees equal the states that decoding sees for the same tokens.

    Attributes:
        d_model: Width ``D`` of the hidden state that they read.
        horizons: Offsets of the heads, ascending from 1.
        reads_future: Whether horizon ``h`` also sees the tokens at ``t + 1 .. t + h - 1`` (when
            decoding: the drafts so far).
        reads_every_token: Whether they do so at every position, wherever states are wanted, as heads do that attend to
            what they said before: ``future`` has all ``T`` positions then, and decoding passes the tokens of chunks.
        num_features: How many inner layers of the trunk they read. If any, ``forward``, ``extend`` and ``read`` take
            one keyword more, ``features``: a tuple of so many ``(B, T, D)``, shallow to deep. Horizon 1 reads none.
    """

    d_model: int
    reads_future: bool = False
    reads_every_token: bool = False
    num_features: int = 0

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
    ) -> tuple[Float[Tensor, "B _ D"], ...] | MixtureStates:
        """Return one state a horizon, for training.

        Args:
            hidden: The trunk's hidden states.
            far_hidden: The same, for horizons beyond the first, where they must give the trunk no gradient; ``hidden``
                if ``None``.
            future: Embeddings of the tokens between, ``K = max(horizons) - 1``; needed if ``reads_future``. At all
                positions, ``(B, T, K, E)``, if ``reads_every_token``.
            positions: Where horizons beyond the first are wanted; everywhere if ``None`` (then ``P = T``).
            document_ids: Which document every position belongs to.

        Shape:
            horizon 1: ``(B, T, D)``; every other horizon: ``(B, P, D)``. Or :class:`MixtureStates`.
        """

    def features_of(self, output: TrunkOutput) -> dict[str, Any]:
        """Return the keyword ``features`` for ``forward``, ``extend`` and ``read``, if these heads read any."""
        return {"features": output.features} if self.num_features else {}

    @abstractmethod
    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the states of horizon 1 alone, those that ``forward`` returns first.

        Args:
            hidden: The trunk's hidden states.
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
        """Append a chunk that ``state.begin`` has announced: ``extend`` without its CPU-side bookkeeping.

        In tensor operations only, so that it can be compiled. Heads that cannot do so implement ``extend`` itself.

        Args:
            hidden: The trunk's output for the chunk.
            state: Which ``begin`` has told of the chunk.
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
        **given: Any,
    ) -> Float[Tensor, "B T D"]:
        """Append a chunk of the trunk's hidden states and return the states of horizon 1, which verification needs.

        Args:
            hidden: The trunk's output for the chunk.
            state: Of these heads; ``commit`` it together with the trunk's.
            tokens: The chunk; needed if ``reads_every_token``, unless the state is for no drafts.
            embed: Embeds token ids; needed with them.
            **given: What :meth:`features_of` returns.
        """
        state.begin(hidden.shape[1])
        return self.read(hidden, state, tokens=tokens, embed=embed, **given)

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
        """Return the states that predict the token after each of ``tokens``: drafts, or the token emitted last.

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

    def draft_step(
        self,
        tokens: Int[Tensor, "B N"],
        state: DecodingState,
        *,
        depth: int,
        before: Tensor | None,
        parents: Int[Tensor, "B N"],
        embed: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor, int], Tensor],
    ) -> tuple[Tensor, Float[Tensor, "B _ V"]]:
        """Return what the next depth is given as ``before``, and the logits of the token after each of ``tokens``.

        That is :meth:`draft_states` and its logits. Chains and trees are made of this step.

        Args:
            tokens: See :meth:`draft_states`, as for all arguments but the last.
            state: Of these heads, committed.
            depth: Of ``tokens``.
            before: What this returned first at the depth before; ``None`` at depth 0.
            parents: Which of ``before`` each token was drafted from.
            embed: Embeds token ids.
            unembed: Turns states of the horizon with a given index into logits; called as ``unembed(states, index)``.
        """
        states = self.draft_states(tokens, state, depth=depth, before=before, parents=parents, embed=embed)
        return states, unembed(states, horizon_of_draft(self.horizons, depth)[0])

    def draft(
        self,
        token: Int[Tensor, " B"],
        state: DecodingState,
        *,
        num_drafts: int,
        embed: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor, int], Tensor],
        sampler: DraftSampler | None = None,
    ) -> Draft:
        """Propose a chain of tokens that follow ``token``, by the horizons beyond the first.

        Args:
            token: The token emitted last, which the trunk has not read.
            state: Of these heads, committed; drafts start from its last position.
            num_drafts: How many tokens ``K`` to propose at most, at most ``max_drafts``.
            embed: Embeds token ids.
            unembed: Turns states ``(B, N, D)`` of the horizon with a given index into logits ``(B, N, V)``; called as
                ``unembed(states, index)``. Horizon 1 has index 0.
            sampler: Samples each draft, nearest first; takes the argmax if ``None``.

        Raises:
            ValueError: If ``num_drafts`` lies outside 1 .. ``max_drafts``.
        """
        self.check_num_drafts(num_drafts)
        sampler = GreedySampler() if sampler is None else sampler
        root = torch.zeros_like(token)[:, None]
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        probs: list[Tensor] = []
        before: Tensor | None = None
        for depth in range(num_drafts):
            before, scores = self.draft_step(
                token[:, None], state, depth=depth, before=before, parents=root, embed=embed, unembed=unembed
            )
            logits.append(scores[:, 0])
            token, sampled_from = sampler(logits[-1])
            tokens.append(token)
            if sampled_from is not None:
                probs.append(sampled_from)
            if sampler.done:
                break
        return Draft(
            tokens=torch.stack(tokens, dim=1),
            logits=torch.stack(logits, dim=1),
            probs=torch.stack(probs, dim=1) if probs else None,
        )

    def check_num_drafts(self, num_drafts: int) -> None:
        """Refuse to draft nothing, or more than the heads can.

        Args:
            num_drafts: How many tokens one after the other are asked for.

        Raises:
            ValueError: If the number lies outside 1 .. ``max_drafts``.
        """
        if num_drafts < 1:
            refuse(self, f"num_drafts must be at least 1, got {num_drafts}.")
        most = self.max_drafts
        if most is not None and num_drafts > most:
            refuse(self, f"num_drafts must lie in 1..{most} for {len(self.horizons)} horizons, got {num_drafts}.")

    @abstractmethod
    def flops(self, length: int, num_far: int) -> int:
        """Return the same as :meth:`Trunk.flops`, with horizons beyond the first at ``num_far`` positions only.

        If ``num_far`` is 0, it is that of :meth:`first`.
        """

    @property
    def states_scored(self) -> int:
        """How many states the output matrix scores at a position where horizons beyond the first are trained."""
        return len(self.horizons) - 1

    @property
    def max_drafts(self) -> int | None:
        """How many tokens these heads can draft: up to the farthest horizon. ``None`` if they can go on and on."""
        return max(self.horizons) - 1
