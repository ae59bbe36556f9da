"""Token-conditioned heads: one small recurrent step that all horizons share."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import at_least
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.heads.common import LastStateHeads, last_hidden_state, needed_future
from mtp_modules.layers.transformer import RMSNorm


class RecurrentHeads(LastStateHeads):
    r"""Compute each horizon from the previous one with a shared step that reads the token in between.

    Horizon 1 is the trunk's hidden state itself, so the next-token model is unchanged. From there

    .. math:: s_{h+1} = \mathrm{norm}(s_h + W_o \, \mathrm{silu}(W_s \, s_h + W_e \, e(x_{t+h}) + b_h))

    where :math:`x_{t+h}` is the true token in training and the previous draft in decoding. Conditioning drafts on
    drafts follows Hydra (Ankner et al. 2024, arXiv 2402.05109); sharing the step follows the recurrent drafter
    (Zhang et al. 2024, arXiv 2403.09919).

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        width: Inner width of the step; ``d_model`` if ``None``.
        embedding_width: Width of the trunk's token embedding; ``d_model`` if ``None``.
        norm_gain: Initial gain of the norm after the step. For a pretrained trunk, use the root mean square of its
            hidden states (2.2 for SmolLM2-135M), the scale that its output matrix expects.

    Shape:
        hidden ``(B, T, D)``, future ``(B, P, H - 1, E)`` -> horizon 1 ``(B, T, D)``, the others ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1, or ``future`` is missing.

    Example:
        >>> heads = RecurrentHeads(d_model=8, num_horizons=3)
        >>> states = heads(torch.zeros(1, 5, 8), future=torch.zeros(1, 5, 2, 8))
        >>> len(states), states[2].shape
        (3, torch.Size([1, 5, 8]))
    """

    reads_future = True
    from_state: nn.Linear
    from_token: nn.Linear

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        width: int | None = None,
        embedding_width: int | None = None,
        norm_gain: float = 1.0,
    ) -> None:
        super().__init__()
        at_least(self, "d_model", d_model, 1)
        at_least(self, "num_horizons", num_horizons, 1)
        self.d_model, self.num_horizons = d_model, num_horizons
        self.embedding_width = d_model if embedding_width is None else embedding_width
        width = d_model if width is None else width
        at_least(self, "width", width, 1)
        at_least(self, "embedding_width", self.embedding_width, 1)
        if num_horizons == 1:
            return  # no step, so no parameters
        self.from_state = nn.Linear(d_model, width, bias=False)
        self.from_token = nn.Linear(self.embedding_width, width, bias=False)
        self.depth_bias = nn.Parameter(torch.zeros(num_horizons - 1, width))
        self.out = nn.Linear(width, d_model, bias=False)
        self.norm = RMSNorm(d_model, gain=norm_gain)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the matrices with variance 1/fan-in, the output matrix smaller."""
        if self.num_horizons == 1:
            return
        nn.init.normal_(self.from_state.weight, std=self.from_state.in_features**-0.5)
        nn.init.normal_(self.from_token.weight, std=self.from_token.in_features**-0.5)
        nn.init.normal_(self.out.weight, std=0.1 * self.out.in_features**-0.5)
        nn.init.zeros_(self.depth_bias)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, self.num_horizons + 1))

    @property
    def max_drafts(self) -> int | None:
        """Any number: the step can be repeated."""
        return None if self.num_horizons > 1 else 0

    def _step(self, state: Float[Tensor, "*N D"], token: Float[Tensor, "*N E"], depth: int) -> Float[Tensor, "*N D"]:
        inner = self.from_state(state) + F.linear(token, self.from_token.weight, self.depth_bias[depth])
        return self.norm(state + self.out(F.silu(inner)))

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B P K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...]:
        """Return one state a horizon; see :class:`~mtp_modules.core.interfaces.Heads`."""
        if self.num_horizons == 1:
            return (hidden,)
        future = needed_future(self, future)
        far = hidden if far_hidden is None else far_hidden
        state = far if positions is None else at_positions(far, positions)
        states = [hidden]
        for depth, token in enumerate(future.unbind(dim=2)):
            state = self._step(state, token, depth)
            states.append(state)
        return tuple(states)

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of one step per horizon beyond the first; horizon 1 costs none."""
        if self.num_horizons == 1:
            return 0
        step = sum(layer.weight.numel() for layer in (self.from_state, self.from_token, self.out))
        return 2 * step * num_far * (self.num_horizons - 1)

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
        """Take one step with each token; beyond ``H``, repeat the last step."""
        if before is None:
            previous = last_hidden_state(self, state).last[:, None]
        else:
            previous = before if tokens.shape[1] == 1 else at_positions(before, parents)
        return self._step(previous, embed(tokens), min(depth, self.num_horizons - 2))
