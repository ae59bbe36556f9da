"""Independent heads: one linear map per horizon."""

from collections.abc import Callable, Sequence
from typing import cast

from torch import nn

from mtp_modules.core.checks import at_least
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions, horizon_of_draft, leaping_horizons
from mtp_modules.heads.common import LastStateHeads, last_hidden_state
from mtp_modules.layers.last_hidden import LastHiddenState


class LinearHeads(LastStateHeads):
    """Predict every horizon with its own linear map of the trunk's hidden state.

    The cheapest heads: horizons do not see one another. Gloeckle et al. 2024 (arXiv 2404.19737), head ablation.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        stride: Distance from each horizon to the next: 1 for 1 .. H, 2 for 1, 3, 5 and so on (L-MTP, arXiv 2505.17505).
            Drafts between two horizons come from earlier positions, whose horizons reach those tokens.

    Shape:
        hidden ``(B, T, D)`` -> one ``(B, T, D)`` state per horizon.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> import torch
        >>> heads = LinearHeads(d_model=8, num_horizons=2)
        >>> [state.shape for state in heads(torch.zeros(1, 3, 8))]
        [torch.Size([1, 3, 8]), torch.Size([1, 3, 8])]
    """

    def __init__(self, *, d_model: int, num_horizons: int, stride: int = 1) -> None:
        super().__init__()
        at_least(self, "d_model", d_model, 1)
        at_least(self, "num_horizons", num_horizons, 1)
        at_least(self, "stride", stride, 1)
        self.d_model, self.stride = d_model, stride
        maps = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(num_horizons))
        self.maps = cast("Sequence[nn.Linear]", maps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise with random orthogonal matrices, which keep the hidden state's scale."""
        for linear in self.maps:
            nn.init.orthogonal_(linear.weight)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1, 1 + stride, 1 + 2 stride and so on."""
        return leaping_horizons(len(self.maps), self.stride)

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
        return (self.maps[0](hidden), *(linear(picked) for linear in self.maps[1:]))

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Apply horizon 1's map at every position."""
        return self.maps[0](hidden)

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of one square map per horizon."""
        return 2 * self.d_model**2 * (length + (len(self.maps) - 1) * num_far)

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
        """Apply a horizon's map to the last hidden state, or to an earlier one if it leaps; ignores ``tokens``."""
        index, back = horizon_of_draft(self.horizons, depth)
        return self.maps[index](last_hidden_state(self, state).back(back))[:, None]
