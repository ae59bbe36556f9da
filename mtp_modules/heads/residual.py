"""Medusa's heads: a few residual blocks per horizon, which start as the identity."""

from collections.abc import Callable, Sequence
from typing import cast

from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.checks import at_least
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions, horizon_of_draft, leaping_horizons
from mtp_modules.heads.common import LastStateHeads, last_hidden_state
from mtp_modules.layers.last_hidden import LastHiddenState


class ResidualBlock(nn.Module):
    """Add ``silu(W x + b)`` to ``x``; the identity until it is trained.

    Args:
        d_model: Width ``D``.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set matrix and bias to 0; the slope of ``silu`` at 0 is 1/2, so both get a gradient from the first step."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Transform states ``(..., D)``."""
        return x + F.silu(self.linear(x))


class ResidualHeads(LastStateHeads):
    r"""Predict each further horizon with residual blocks of its own on the trunk's hidden state.

    Horizon 1 is the trunk's hidden state itself, so the next-token model is unchanged. Each block computes

    .. math:: x + \mathrm{silu}(W x + b)

    with :math:`W = 0` and :math:`b = 0` at the start, so that every horizon first predicts what horizon 1 predicts.
    Cai et al. 2024 (Medusa, arXiv 2401.10774), section 2.1. There each head has an output matrix of its own:
    ``MTPModel(own_unembeddings=True)``.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        num_layers: Blocks of each horizon beyond the first.
        stride: Distance from each horizon to the next: 1 for 1 .. H, 2 for 1, 3, 5 and so on (L-MTP, arXiv 2505.17505).
            Drafts between two horizons come from earlier positions, whose horizons reach those tokens.

    Shape:
        hidden ``(B, T, D)`` -> horizon 1 ``(B, T, D)``, the others ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> import torch
        >>> heads, hidden = ResidualHeads(d_model=8, num_horizons=3), torch.randn(1, 5, 8)
        >>> [torch.equal(state, hidden) for state in heads(hidden)]
        [True, True, True]
    """

    def __init__(self, *, d_model: int, num_horizons: int, num_layers: int = 1, stride: int = 1) -> None:
        super().__init__()
        at_least(self, "d_model", d_model, 1)
        at_least(self, "num_horizons", num_horizons, 1)
        at_least(self, "num_layers", num_layers, 1)
        at_least(self, "stride", stride, 1)
        self.d_model, self.num_layers, self.stride = d_model, num_layers, stride
        stacks = (nn.Sequential(*(ResidualBlock(d_model) for _ in range(num_layers))) for _ in range(num_horizons - 1))
        self.stacks = cast("Sequence[nn.Sequential]", nn.ModuleList(stacks))

    @property
    def horizons(self) -> tuple[int, ...]:
        """1, 1 + stride, 1 + 2 stride and so on."""
        return leaping_horizons(len(self.stacks) + 1, self.stride)

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
        far = hidden if far_hidden is None else far_hidden
        picked = far if positions is None else at_positions(far, positions)
        return (hidden, *(stack(picked) for stack in self.stacks))

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of the blocks' square maps; horizon 1 costs none."""
        return 2 * self.d_model**2 * self.num_layers * len(self.stacks) * num_far

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> LastHiddenState:
        """Make an empty state."""
        return LastHiddenState(batch_size, capacity, count=self.stride if for_drafts else 0)

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
        """Apply a horizon's blocks to the last hidden state, or to an earlier one if it leaps; ignores ``tokens``."""
        index, back = horizon_of_draft(self.horizons, depth)
        states: Tensor = self.stacks[index - 1](last_hidden_state(self, state).back(back)[:, None])
        return states
