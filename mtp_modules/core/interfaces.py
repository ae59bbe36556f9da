"""The contracts of this package. Read this file first.

::

    tokens --> Trunk --> hidden --> Heads --> one state per horizon --> Unembedding --> MultiTokenLoss      (training)
                 ^                    |                                      |
                 |                    +-- Draft (tokens, their probs q) -----+
                 +-- verify K+1 positions <-- Decoder: accept, rewind, emit                                 (decoding)

:mod:`mtp_modules.core.trunk` holds the contract of trunks; the contract of heads is below.

A component is one of these abstract classes, one of the abstract classes of the loss
(:mod:`mtp_modules.core.objective`), or a final class that implements one. :mod:`mtp_modules.core.shapes` defines the
letters of shapes.
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
    """Turn the trunk's hidden states into one state per horizon. The unembedding turns states into logits.

    Invariant: for the same tokens, training and decoding compute the same states.

    Attributes:
        d_model: Width ``D`` of the hidden states that the heads read.
        horizons: Offsets of the heads, ascending from 1.
        reads_future: Whether horizon ``h`` also reads the tokens at ``t + 1 .. t + h - 1`` (in decoding: the drafts so
            far).
        reads_every_token: Whether the heads read those tokens at every position, even where no state is needed, as
            heads that attend to their own earlier outputs do. ``future`` then covers all ``T`` positions, and decoding
            passes the tokens of each chunk.
        num_features: How many inner layers of the trunk the heads read. If any, ``forward``, ``extend`` and ``read``
            take one more keyword, ``features``: a tuple of that many ``(B, T, D)``, shallow to deep. Horizon 1 reads
            none.
        reads_token_ids: Whether ``forward`` takes one more keyword, ``future_tokens``: the ids ``(B, P, K)`` of the
            tokens whose embeddings are in ``future``, at the positions of the states.
        transition_rank: How many factors ``F`` follow the ``D`` numbers of each state beyond horizon 1. The unembedding
            multiplies them by a matrix of their own and adds the product to the logits.
        predicts_acceptance: Whether :meth:`confidence` predicts which drafts will be accepted.
    """

    d_model: int
    reads_future: bool = False
    reads_every_token: bool = False
    num_features: int = 0
    reads_token_ids: bool = False
    transition_rank: int = 0
    predicts_acceptance: bool = False

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
        """Return one state per horizon, for training.

        Args:
            hidden: The trunk's hidden states.
            far_hidden: Detached hidden states for horizons beyond the first, if those must not send gradients to the
                trunk; ``hidden`` if ``None``.
            future: Embeddings of the next ``K = max(horizons) - 1`` tokens; required if ``reads_future``. Covers all
                positions, ``(B, T, K, E)``, if ``reads_every_token``.
            positions: Where to compute horizons beyond the first; everywhere if ``None`` (then ``P = T``).
            document_ids: The document of every position.

        Shape:
            horizon 1: ``(B, T, D)``; every other horizon: ``(B, P, D + F)``. Or :class:`MixtureStates`.
        """

    def features_of(self, output: TrunkOutput) -> dict[str, Any]:
        """Return the keyword ``features`` for ``forward``, ``extend`` and ``read``, if these heads read any."""
        return {"features": output.features} if self.num_features else {}

    @abstractmethod
    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return only the states of horizon 1, equal to the first that ``forward`` returns.

        Args:
            hidden: The trunk's hidden states.
            document_ids: The document of every position.
        """

    @abstractmethod
    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> DecodingState:
        """Make an empty state for decoding; see :meth:`Trunk.new_state`.

        Args:
            batch_size: Number ``B`` of rows.
            capacity: Maximum tokens per row, the provisional chunk included.
            for_drafts: False if only horizon 1 will be used. No memory is then allocated for the other heads.
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

        An implementation uses tensor operations only, so it can be compiled. Heads that need more override ``extend``.

        Args:
            hidden: The trunk's output for the chunk.
            state: State of these heads after ``begin``.
            tokens: The chunk's tokens; required if ``reads_every_token``, unless the state has ``for_drafts=False``.
            embed: Embeds token ids; required with ``tokens``.

        Raises:
            ValueError: If these heads do not implement it.
        """
        refuse(self, "cannot be compiled for decoding: they have no read(hidden, state); use the uncompiled model.")

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
            state: State of these heads; ``commit`` it together with the trunk's.
            tokens: The chunk's tokens; required if ``reads_every_token``, unless the state has ``for_drafts=False``.
            embed: Embeds token ids; required with ``tokens``.
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
        """Return the states that predict the token after each of ``tokens``.

        Args:
            tokens: The last emitted token, ``(B, 1)``, at ``depth`` 0; else the drafts at ``depth``, several in a tree.
            state: Committed state of these heads; drafts start from its last position.
            depth: Number of drafts after the last emitted token, up to and including ``tokens``.
            before: The return value at the previous depth; ``None`` at depth 0.
            parents: Index into ``before`` from which each token was drafted.
            embed: Embeds token ids.

        Shape:
            One state per token, or a single state if it is the same for all tokens.
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
        """Return ``before`` for the next depth, and the logits of the token after each of ``tokens``.

        By default these are the result of :meth:`draft_states` and its logits. Chains and trees are built from this
        step.

        Args:
            tokens: See :meth:`draft_states`, as for all arguments but ``unembed``.
            state: Committed state of these heads.
            depth: Depth of ``tokens``.
            before: The first value that this method returned at the previous depth; ``None`` at depth 0.
            parents: Index into ``before`` from which each token was drafted.
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
        """Draft a chain of tokens after ``token`` with the horizons beyond the first.

        Args:
            token: The last emitted token, which the trunk has not read yet.
            state: Committed state of these heads; drafts start from its last position.
            num_drafts: Maximum number ``K`` of drafted tokens, at most ``max_drafts``.
            embed: Embeds token ids.
            unembed: Turns states ``(B, N, D)`` of the horizon with a given index into logits ``(B, N, V)``; called as
                ``unembed(states, index)``. Horizon 1 has index 0.
            sampler: Samples each draft, nearest first; the argmax if ``None``.

        Raises:
            ValueError: If ``num_drafts`` lies outside 1 .. ``max_drafts``.
        """
        self.check_num_drafts(num_drafts)
        sampler = GreedySampler() if sampler is None else sampler
        root = torch.zeros_like(token)[:, None]
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        probs: list[Tensor] = []
        confidence: list[Tensor] = []
        before: Tensor | None = None
        for depth in range(num_drafts):
            before, scores = self.draft_step(
                token[:, None], state, depth=depth, before=before, parents=root, embed=embed, unembed=unembed
            )
            logits.append(scores[:, 0])
            if (log_odds := self.confidence(before)) is not None:
                confidence.append(log_odds[:, 0].double().sigmoid())
            token, sampled_from = sampler(logits[-1], *confidence[-1:])
            tokens.append(token)
            if sampled_from is not None:
                probs.append(sampled_from)
            if sampler.done:
                break
        return Draft(
            tokens=torch.stack(tokens, dim=1),
            logits=torch.stack(logits, dim=1),
            probs=torch.stack(probs, dim=1) if probs else None,
            confidence=torch.stack(confidence, dim=1) if confidence else None,
        )

    def confidence(self, states: Tensor) -> Float[Tensor, "B N"] | None:
        """Return the log-odds that the draft which each state predicts is accepted, if these heads predict that.

        They rest on the text and on the drafts before, never on the draft itself.

        Args:
            states: First return value of :meth:`draft_step`, or states of a horizon beyond the first.
        """
        return None

    def check_num_drafts(self, num_drafts: int) -> None:
        """Raise an error unless the heads can draft ``num_drafts`` tokens.

        Args:
            num_drafts: Length of the chain of drafts.

        Raises:
            ValueError: If ``num_drafts`` lies outside 1 .. ``max_drafts``.
        """
        if num_drafts < 1:
            refuse(self, f"num_drafts must be at least 1, got {num_drafts}.")
        most = self.max_drafts
        if most is not None and num_drafts > most:
            refuse(self, f"num_drafts must lie in 1..{most} for {len(self.horizons)} horizons, got {num_drafts}.")

    @abstractmethod
    def flops(self, length: int, num_far: int) -> int:
        """Return the floating-point operations of ``forward``; see :meth:`Trunk.flops`.

        Horizons beyond the first are computed at ``num_far`` positions; 0 means the cost of :meth:`first`.
        """

    @property
    def states_scored(self) -> int:
        """How many states of horizons beyond the first the output matrix scores per trained position."""
        return len(self.horizons) - 1

    @property
    def max_drafts(self) -> int | None:
        """How many tokens these heads can draft: up to the farthest horizon. ``None`` if there is no limit."""
        return max(self.horizons) - 1
