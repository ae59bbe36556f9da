"""Early-exit heads: each horizon beyond the first reads an inner layer of the trunk."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.heads.common import LastStateHeads, last_hidden_state, needed_features
from mtp_modules.heads.residual import ResidualBlock
from mtp_modules.layers.transformer import RMSNorm


class EarlyExitHeads(LastStateHeads):
    r"""Predict further horizons from inner layers of the trunk, through a norm and residual blocks of their own.

    Horizon 1 is the trunk's hidden state itself, so the next-token model is unchanged. Horizon :math:`h` exits the
    trunk at layer :math:`l_h`,

    .. math:: s_h = \mathrm{blocks}_h(\mathrm{norm}_h(x^{l_h}_t))

    with blocks :math:`x + \mathrm{silu}(W x + b)` that start as the identity. One output matrix for all layers follows
    LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710, section 4). LayerSkip drafts the next token only and runs the
    first layers again for every draft. Here one pass drafts all horizons. The trunk's ``feature_layers`` chooses the
    layers: ``TransformerTrunk(feature_layers=[...])``.

    Args:
        d_model: Width ``D`` of the trunk's hidden states.
        num_horizons: How many future tokens ``H`` each position predicts.
        num_features: How many inner layers the trunk returns.
        exits: For each horizon beyond the first, nearest first, the index of the layer that it reads, counted from 0,
            the shallowest. If ``None``, layers are distributed evenly, the deepest to the nearest horizons.
        num_layers: Blocks of each horizon beyond the first; 0 for a norm only.
        norm_gain: Initial gain of the norm of each horizon. For a pretrained trunk, use the root mean square of its
            hidden states (2.2 for SmolLM2-135M), the scale that its output matrix expects.

    Shape:
        hidden ``(B, T, D)``, features: ``num_features`` times ``(B, T, D)`` -> horizon 1 ``(B, T, D)``, the others
        ``(B, P, D)``.

    Raises:
        ValueError: If a size is too small, ``exits`` does not name one of the layers for each further horizon, or
            ``features`` holds another number of layers.

    Example:
        >>> import torch
        >>> heads = EarlyExitHeads(d_model=8, num_horizons=4, num_features=2)
        >>> heads.exits
        [1, 1, 0]
        >>> states = heads(torch.zeros(1, 5, 8), features=(torch.zeros(1, 5, 8), torch.zeros(1, 5, 8)))
        >>> len(states), states[3].shape
        (4, torch.Size([1, 5, 8]))
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_features: int,
        exits: Sequence[int] | None = None,
        num_layers: int = 1,
        norm_gain: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value, limit in (
            ("d_model", d_model, 1),
            ("num_horizons", num_horizons, 1),
            ("num_features", num_features, 1),
            ("num_layers", num_layers, 0),
        ):
            at_least(self, name, value, limit)
        self.d_model, self.num_features, self.num_layers, count = d_model, num_features, num_layers, num_horizons - 1
        if exits is None:
            exits = [num_features - 1 - index * num_features // count for index in range(count)]
        if len(exits) != count or any(not 0 <= exit_ < num_features for exit_ in exits):
            refuse(
                self,
                f"exits must name one of the layers 0..{num_features - 1} for each of {count} horizons beyond the "
                f"first, got {list(exits)}.",
            )
        self.exits = list(exits)
        stacks = (
            nn.Sequential(RMSNorm(d_model, gain=norm_gain), *(ResidualBlock(d_model) for _ in range(num_layers)))
            for _ in range(count)
        )
        self.stacks = cast("Sequence[nn.Sequential]", nn.ModuleList(stacks))

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, len(self.stacks) + 2))

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B P K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        features: tuple[Float[Tensor, "B T D"], ...] = (),
    ) -> tuple[Float[Tensor, "B _ D"], ...]:
        """Return one state a horizon; see :class:`~mtp_modules.core.interfaces.Heads`."""
        needed_features(self, features)
        picked = features if positions is None else tuple(at_positions(feature, positions) for feature in features)
        return (hidden, *(stack(picked[exit_]) for stack, exit_ in zip(self.stacks, self.exits, strict=True)))

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of the blocks' square maps; horizon 1 costs none."""
        return 2 * self.d_model**2 * self.num_layers * len(self.stacks) * num_far

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        features: tuple[Float[Tensor, "B T D"], ...] = (),
    ) -> Float[Tensor, "B T D"]:
        """Append the announced chunk, and return the states of horizon 1."""
        own = last_hidden_state(self, state)
        needed_features(self, features)
        own.append(torch.cat(features, dim=-1))
        return hidden

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
        """Apply the next horizon's blocks to its layer's output at the last position; ignores ``tokens``."""
        exit_, features = self.exits[depth], last_hidden_state(self, state).last[:, None]
        states: Tensor = self.stacks[depth](features[..., exit_ * self.d_model : (exit_ + 1) * self.d_model])
        return states
