"""A joint distribution of the next tokens: a mixture of components under which they are independent."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import DecodingState, MixtureStates
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.heads.common import LastStateHeads, last_hidden_state, needed_future


class JointHeads(LastStateHeads):
    r"""Predict the next tokens jointly, with a mixture of ``R`` components under each of which they are independent.

    Horizon 1 is the trunk's hidden state itself. Given the next token :math:`x_1`, the distribution of the tokens after
    it is a tensor of canonical rank ``R``,

    .. math:: q(x_2 \dots x_H \mid h, x_1) = \sum_r \gamma_r(h, x_1) \prod_k P_{r,k}(x_k \mid h)

    where :math:`P_{r,k}` comes from a residual block of the hidden state and the output matrix. Each draft is sampled
    from its exact distribution given the previous tokens: once :math:`x_k` is sampled, the weights are multiplied by
    :math:`P_{r,k}(x_k)`. With one component the heads are independent. Basharin et al. 2024 (arXiv 2410.17765), section
    3. There the first token is part of the mixture; here verification needs its distribution from the trunk alone, so
    the token enters the weights instead.

    The loss is the exact negative log-likelihood of the joint distribution; ``MultiTokenLoss(balance=...)`` keeps all
    components in use.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        num_components: Rank ``R`` of the joint distribution.
        width: Inner width of the network that computes the weights; ``d_model`` if ``None``.
        embedding_width: Width of the trunk's token embedding; ``d_model`` if ``None``.

    Shape:
        hidden ``(B, T, D)``, future ``(B, P, H - 1, E)`` ->
        :class:`~mtp_modules.core.mixture.MixtureStates`; ``(hidden,)`` if there is one horizon.

    Raises:
        ValueError: If a size is below 1, or ``future`` is missing.

    Example:
        >>> heads = JointHeads(d_model=8, num_horizons=3, num_components=4)
        >>> states = heads(torch.zeros(1, 5, 8), future=torch.zeros(1, 5, 2, 8))
        >>> states.components.shape, states.log_weights.shape
        (torch.Size([1, 5, 2, 4, 8]), torch.Size([1, 5, 4]))
    """

    reads_future = True
    from_state: nn.Linear
    from_token: nn.Linear

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_components: int,
        width: int | None = None,
        embedding_width: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding_width = d_model if embedding_width is None else embedding_width
        width = d_model if width is None else width
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("num_components", num_components),
            ("width", width),
            ("embedding_width", self.embedding_width),
        ):
            at_least(self, name, value, 1)
        self.d_model, self.num_horizons, self.num_components = d_model, num_horizons, num_components
        maps = (nn.Linear(d_model, num_components * d_model) for _ in range(num_horizons - 1))
        self.maps = cast("Sequence[nn.Linear]", nn.ModuleList(maps))
        if num_horizons == 1:
            return  # nothing to draft, so no weights
        self.from_state = nn.Linear(d_model, width)
        self.from_token = nn.Linear(self.embedding_width, width, bias=False)
        self.to_weights = nn.Linear(width, num_components)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the components close to horizon 1 but different from one another, with nearly equal weights."""
        for linear in self.maps:
            nn.init.normal_(linear.weight, std=0.5 * linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if self.num_horizons == 1:
            return
        for linear, gain in ((self.from_state, 1.0), (self.from_token, 1.0), (self.to_weights, 0.1)):
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        nn.init.zeros_(self.from_state.bias)
        nn.init.zeros_(self.to_weights.bias)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, self.num_horizons + 1))

    def _components(self, index: int, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N R D"]:
        """Return the state of each component for one horizon beyond the first."""
        moved = F.silu(self.maps[index](hidden))
        return hidden[..., None, :] + moved.view(*hidden.shape[:-1], self.num_components, self.d_model)

    def _log_weights(self, hidden: Float[Tensor, "*N D"], token: Float[Tensor, "*N E"]) -> Float[Tensor, "*N R"]:
        inner = F.silu(self.from_state(hidden) + self.from_token(token))
        weights: Tensor = self.to_weights(inner)
        return weights.log_softmax(dim=-1)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B P K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...] | MixtureStates:
        """Return horizon 1's states, and the mixture of the others."""
        if self.num_horizons == 1:
            return (hidden,)
        future = needed_future(self, future)
        far = hidden if far_hidden is None else far_hidden
        picked = far if positions is None else at_positions(far, positions)
        components = [self._components(index, picked) for index in range(self.num_horizons - 1)]
        return MixtureStates(hidden, torch.stack(components, dim=2), self._log_weights(picked, future[:, :, 0]))

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of components and weights; horizon 1 costs none."""
        if self.num_horizons == 1:
            return 0
        weights = sum(layer.weight.numel() for layer in (self.from_state, self.from_token, self.to_weights))
        return 2 * num_far * (sum(linear.weight.numel() for linear in self.maps) + weights)

    @property
    def states_scored(self) -> int:
        """One state per component and horizon beyond the first."""
        return self.num_components * (self.num_horizons - 1)

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
        """Raise an error: a mixture is not a single state.

        Raises:
            ValueError: Always. Beam search with drafts calls this method.
        """
        refuse(
            self,
            "a draft's distribution is a mixture, not that of a single state, so beam search cannot use these drafts; "
            "use BeamDecoder, or call draft_step.",
        )

    def draft_step(
        self,
        tokens: Int[Tensor, "B N"],
        state: DecodingState,
        *,
        depth: int,
        before: Float[Tensor, "B M R"] | None,
        parents: Int[Tensor, "B N"],
        embed: Callable[[Tensor], Tensor],
        unembed: Callable[[Tensor, int], Tensor],
    ) -> tuple[Float[Tensor, "B N R"], Float[Tensor, "B N V"]]:
        """Return the log weights after each of ``tokens``, and the log probabilities of the mixture."""
        own = last_hidden_state(self, state)
        if before is None:
            log_weights = self._log_weights(own.last[:, None], embed(tokens))
        else:
            chosen = own.scratch.gather(2, tokens[:, None].expand(-1, self.num_components, -1)).transpose(1, 2)
            log_weights = (at_positions(before, parents) + chosen).log_softmax(dim=-1)
        own.scratch = log_probs = unembed(self._components(depth, own.last), depth + 1).log_softmax(dim=-1)
        return log_weights, (log_weights[..., None] + log_probs[:, None]).logsumexp(dim=2)
