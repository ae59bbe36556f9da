"""The gated feed-forward layer; :mod:`mtp_modules.layers.transformer` explains the layout of its fused matrix."""

import math

from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.shapes import Float, Tensor


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv 2002.05202).

    The rows of ``gate_up`` are ``(n, 2, hidden / n)``: ``n`` pairs of a block of gates and the block that they
    multiply, with ``n`` the largest divisor of 8 that divides ``hidden``.

    Args:
        d_model: Width ``D``.
        hidden: Inner width.
    """

    def __init__(self, d_model: int, *, hidden: int) -> None:
        super().__init__()
        self.num_blocks = self.blocks_of(hidden)
        self.block = hidden // self.num_blocks
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    @staticmethod
    def blocks_of(hidden: int) -> int:
        """Return the number of blocks ``n``.

        Args:
            hidden: Inner width.
        """
        return math.gcd(hidden, 8)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Transform states ``(..., D)``."""
        blocks = self.gate_up(x).view(*x.shape[:-1], -1, 2, self.block)
        return self.down((F.silu(blocks.select(-2, 0)) * blocks.select(-2, 1)).flatten(-2))

    def flops(self, num_positions: int) -> int:
        """Return the floating-point operations for ``num_positions`` positions.

        Args:
            num_positions: Number of positions.
        """
        return 2 * num_positions * (self.gate_up.weight.numel() + self.down.weight.numel())
