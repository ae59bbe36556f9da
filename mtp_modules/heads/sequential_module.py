"""One module of sequential heads."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from mtp_modules.core.shapes import Float, Int, Shaped, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.layers.transformer import RMSNorm, TransformerLayer


class ChainStep(nn.Module, ABC):
    """One step of heads that read a sequence of states and tokens with a transformer layer.

    Attributes:
        state_norm: Normalises the state.
        token_norm: Normalises the embedding.
        layer: The layer.
    """

    state_norm: RMSNorm
    token_norm: RMSNorm
    layer: TransformerLayer

    @property
    @abstractmethod
    def joining_flops(self) -> int:
        """Operations of joining a state and a token."""

    @abstractmethod
    def enter(
        self, states: Float[Tensor, "*N D"], tokens: Float[Tensor, "*N E"]
    ) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N W"]]:
        """Return what the layer adds to, and what it attends from, before its norm.

        Args:
            states: Output of the previous step, or of the trunk.
            tokens: Embedding of the future token of each state.
        """


class SequentialModule(ChainStep):
    """Project the concatenation of a state and the embedding of a future token, then apply a transformer layer.

    Args:
        d_model: Width ``D`` of a state.
        embedding_width: Width ``E`` of an embedding.
        embedding_first: Whether the projection has the embedding's columns before the state's.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layer.
        qk_norm: Normalise queries and keys.
        norm_eps: Added to the mean square in every norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        embedding_width: int,
        embedding_first: bool,
        num_heads: int,
        num_kv_heads: int | None,
        ffn_width: int | None,
        qk_norm: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.embedding_first = embedding_first
        self.state_norm, self.token_norm = RMSNorm(d_model, eps=norm_eps), RMSNorm(embedding_width, eps=norm_eps)
        self.merge = nn.Linear(d_model + embedding_width, d_model, bias=False)
        self.layer = TransformerLayer(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_width=ffn_width,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projection with variance 1/fan-in; the other parts reset themselves."""
        nn.init.normal_(self.merge.weight, std=self.merge.in_features**-0.5)

    @property
    def joining_flops(self) -> int:
        """Operations of joining a state and a token."""
        return 2 * self.merge.weight.numel()

    def enter(
        self, states: Float[Tensor, "*N D"], tokens: Float[Tensor, "*N E"]
    ) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N D"]]:
        """Return the layer's input twice."""
        joined = self.join(states, tokens)
        return joined, joined

    def join(self, states: Float[Tensor, "*N D"], tokens: Float[Tensor, "*N E"]) -> Float[Tensor, "*N D"]:
        """Return the layer's input.

        Args:
            states: Output of the previous module, or of the trunk.
            tokens: Embedding of the future token of each state.
        """
        state, token = self.state_norm(states), self.token_norm(tokens)
        joined: Tensor = self.merge(torch.cat((token, state) if self.embedding_first else (state, token), dim=-1))
        return joined

    def forward(
        self,
        states: Float[Tensor, "B T D"],
        tokens: Float[Tensor, "B T E"],
        table: tuple[Tensor, Tensor],
        mask: Shaped[Tensor, "#B 1 _ T"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        picked_table: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """Process whole sequences; see :meth:`TransformerLayer.forward`.

        Args:
            states: Output of the previous module, or of the trunk.
            tokens: Embedding of the future token of each state.
            table: Rotations of the positions.
            mask: True where a query attends; ``None`` for the causal mask.
            positions: Positions of the output; all if ``None``.
            picked_table: Rotations of ``positions``.
        """
        x = self.join(states, tokens)
        picked = None if positions is None else at_positions(x, positions)
        output: Tensor = self.layer(x, table, mask, picked, picked_table)
        return output
