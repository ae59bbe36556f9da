"""The layer of released EAGLE-3 checkpoints: attention over a token and a state side by side."""

from typing import cast

import torch
from torch import nn

from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.heads.sequential_module import ChainStep
from mtp_modules.layers.transformer import Attention, RMSNorm, TransformerLayer


class SideBySideModule(ChainStep):
    """Attend over the concatenation of a normalised embedding and a normalised state, and add to the state.

    Queries, keys and values are projections of ``[norm(e); norm(s)]``, of width ``2 D``; what attention and the
    feed-forward layer return is added to the state alone.

    Args:
        d_model: Width ``D`` of a state.
        embedding_width: Width ``E`` of an embedding.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layer.
        norm_before_residual: Add to the normalised state instead of the state itself.
        norm_eps: Added to the mean square in every norm.
        head_dim: Width of one head; ``d_model / num_heads`` if ``None``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        embedding_width: int,
        num_heads: int,
        num_kv_heads: int | None,
        ffn_width: int | None,
        norm_before_residual: bool,
        norm_eps: float,
        head_dim: int | None,
    ) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.state_norm, self.token_norm = RMSNorm(d_model, eps=norm_eps), RMSNorm(embedding_width, eps=norm_eps)
        self.layer = TransformerLayer(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_width=ffn_width,
            norm_eps=norm_eps,
            head_dim=head_dim,
        )
        self.layer.attention = Attention(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            head_dim=head_dim,
            input_width=d_model + embedding_width,
        )
        self.layer.attention_norm = cast("RMSNorm", nn.Identity())  # both parts have been normalised
        self.layer.reset_parameters()

    @property
    def joining_flops(self) -> int:
        """Operations of joining a state and a token: none."""
        return 0

    def enter(
        self, states: Float[Tensor, "*N D"], tokens: Float[Tensor, "*N E"]
    ) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N W"]]:
        """Return the state, and the normalised token and state."""
        state = self.state_norm(states)
        return state if self.norm_before_residual else states, torch.cat((self.token_norm(tokens), state), dim=-1)
