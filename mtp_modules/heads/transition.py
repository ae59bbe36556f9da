"""DSpark's Markov head: a low-rank bias of each draft's logits by the token before it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.drafts import one_hot
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.heads.wrapped import WrappedHeads


class TransitionHeads(WrappedHeads):
    r"""Add to the logits of every draft of other heads a bias that depends on the token before it.

    Horizon :math:`h` of the heads has the logits :math:`U s_h`. With a transition of rank :math:`r` they are

    .. math:: U s_h + W_2 \, W_1[x_{t+h-1}]

    where :math:`x_{t+h-1}` is the true token in training and the previous draft in decoding. So heads that do not see
    one another (linear, parallel, residual, block diffusion) draft tokens that fit one another, for a look-up and a
    product with an :math:`r`-column matrix per draft. Each draft's distribution is still a softmax given the tokens
    before it, which verification divides by. The same transition serves all horizons. Horizon 1 has none. DSpark 2026
    (arXiv 2607.05147), the Markov head.

    A state carries its :math:`W_1[x]` as ``r`` factors behind its ``D`` numbers. :math:`W_2` belongs to the
    unembedding and starts as 0, so the heads first predict what they predict without it.

    Args:
        heads: Any heads with one state per horizon.
        vocab_size: Number ``V`` of token ids, that of the trunk.
        rank: Rank ``r``; if ``None``, the transition is the whole matrix ``V x V``, for small vocabularies.

    Shape:
        That of the heads, with states beyond horizon 1 ``(B, P, D + r)``, or ``(B, P, D + V)`` for the whole matrix.

    Raises:
        ValueError: If a size is below 1, the rank is not below ``vocab_size``, the heads have a mixture or a transition
            already, or ``future_tokens`` is missing.

    Example:
        >>> from mtp_modules import LinearHeads
        >>> heads = TransitionHeads(heads=LinearHeads(d_model=8, num_horizons=3), vocab_size=50, rank=4)
        >>> states = heads(torch.zeros(1, 5, 8), future_tokens=torch.zeros(1, 5, 2, dtype=torch.long))
        >>> [state.shape for state in states]
        [torch.Size([1, 5, 8]), torch.Size([1, 5, 12]), torch.Size([1, 5, 12])]
    """

    previous: nn.Embedding | None

    def __init__(self, *, heads: Heads, vocab_size: int, rank: int | None = 64) -> None:
        super().__init__(heads)
        at_least(self, "vocab_size", vocab_size, 1)
        if rank is not None:
            at_least(self, "rank", rank, 1)
            if rank >= vocab_size:
                refuse(
                    self,
                    f"rank must be below vocab_size={vocab_size}, got {rank}; set it to null (None) for the whole "
                    "matrix, which is smaller then.",
                )
        if heads.transition_rank:
            refuse(self, f"heads must have no transition yet, got {type(heads).__name__} with one; leave one out.")
        drafts = len(heads.horizons) > 1
        self.vocab_size, self.rank = vocab_size, rank
        if drafts:
            self.reads_token_ids, self.transition_rank = True, vocab_size if rank is None else rank
        self.previous = nn.Embedding(vocab_size, rank) if drafts and rank is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the rows of ``W_1`` with length 1 on average."""
        if self.previous is not None:
            nn.init.normal_(self.previous.weight, std=self.transition_rank**-0.5)

    def _with_factors(self, states: Float[Tensor, "*N D"], tokens: Int[Tensor, "*N"]) -> Float[Tensor, "*N W"]:
        table = self.previous
        factors = one_hot(tokens, self.vocab_size).to(states.dtype) if table is None else table(tokens)
        return torch.cat((states, factors), dim=-1)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B _ K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        future_tokens: Int[Tensor, "B P K"] | None = None,
        **given: Any,
    ) -> tuple[Float[Tensor, "B _ _"], ...]:
        """Return one state a horizon; see :class:`~mtp_modules.core.interfaces.Heads`."""
        first, *far = super().forward(
            hidden, far_hidden=far_hidden, future=future, positions=positions, document_ids=document_ids, **given
        )
        if not far:
            return (first,)
        if future_tokens is None:
            refuse(self, "future_tokens is missing; pass the ids of the next tokens (MTPModel does).")
        before = [future_tokens[:, :, horizon - 2] for horizon in self.horizons[1:]]
        return (first, *(self._with_factors(state, tokens) for state, tokens in zip(far, before, strict=True)))

    def draft_states(
        self,
        tokens: Int[Tensor, "B N"],
        state: DecodingState,
        *,
        depth: int,
        before: Float[Tensor, "B M W"] | None,
        parents: Int[Tensor, "B N"],
        embed: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "B N W"]:
        """Return the state of the heads for each of ``tokens``, and the token's factors behind it."""
        states = super().draft_states(
            tokens,
            state,
            depth=depth,
            before=None if before is None else before[..., : self.d_model],
            parents=parents,
            embed=embed,
        )
        return self._with_factors(states.expand(-1, tokens.shape[1], -1), tokens)

    def confidence(self, states: Float[Tensor, "B N W"]) -> Float[Tensor, "B N"] | None:
        """Return what the heads predict of their part of the states."""
        return self.heads.confidence(states[..., : self.d_model])
