"""One layer of context-block heads."""

import torch
from torch import nn

from mtp_modules.core.shapes import Bool, Float, Tensor
from mtp_modules.layers.transformer import TransformerLayer

Table = tuple[Tensor, Tensor]
"""Rotations of some positions."""


class ContextLayer(nn.Module):
    """A transformer layer over blocks of slots, whose keys and values also come from a context.

    Every slot attends to the positions of the context that its block may see, and to the slots of its block.

    Args:
        layer: Its matrices and norms.
        causal: Whether a slot attends to earlier slots and itself only, not to all slots of its block.
    """

    def __init__(self, layer: TransformerLayer, *, causal: bool = False) -> None:
        super().__init__()
        self.layer, self.causal = layer, causal

    def forward(
        self,
        x: Float[Tensor, "B P S D"],
        table: Table,
        context: Float[Tensor, "B T D"],
        context_table: Table,
        seen: Bool[Tensor, "B 1 P T"],
    ) -> Float[Tensor, "B P S D"]:
        """Process blocks of a whole sequence.

        Args:
            x: ``P`` blocks of ``S`` slots.
            table: Rotations of the slots, block by block.
            context: Normalised context.
            context_table: Rotations of its positions.
            seen: Which positions of the context each block sees.
        """
        _, keys, values = self.layer.attention.project(context, context_table)
        return self.attend(x, table, keys, values, seen)

    def attend(
        self,
        x: Float[Tensor, "B P S D"],
        table: Table,
        keys: Float[Tensor, "B h T d"],
        values: Float[Tensor, "B h T d"],
        seen: Bool[Tensor, "#B 1 P T"] | None,
    ) -> Float[Tensor, "B P S D"]:
        """Process blocks, given the keys and values of the context.

        Args:
            x: ``P`` blocks of ``S`` slots.
            table: Rotations of the slots, block by block.
            keys: Of the context.
            values: Of the context.
            seen: Which positions of the context each block sees; all if ``None``.
        """
        attention, (batch, blocks, slots, _) = self.layer.attention, x.shape
        normed = self.layer.attention_norm(x).flatten(1, 2)
        queries, own_keys, own_values = attention.project(normed, table)
        shape = (*queries.shape[:3], blocks, slots)
        queries = queries.view(*shape, -1) * attention.head_dim**-0.5
        own_keys, own_values = (part.view(batch, shape[1], 1, blocks, slots, -1) for part in (own_keys, own_values))
        scores = (queries.flatten(2, 4) @ keys.mT).view(*shape, -1)  # one product for all blocks
        if seen is not None:
            scores = scores.masked_fill(~seen[:, :, None, :, None], -torch.inf)
        own_scores = queries @ own_keys.mT
        if self.causal:
            later = torch.ones(slots, slots, dtype=torch.bool, device=x.device).triu(1)
            own_scores = own_scores.masked_fill(later, -torch.inf)
        scores = torch.cat((scores, own_scores), dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        length = keys.shape[2]
        mixed = (weights[..., :length].flatten(2, 4) @ values).view(*shape, -1) + weights[..., length:] @ own_values
        # (B, h, g, P, S, d) -> (B, P, S, h g d)
        x = x + attention.out(mixed.permute(0, 3, 4, 1, 2, 5).reshape(batch, blocks, slots, -1))
        output: Tensor = x + self.layer.ffn(self.layer.ffn_norm(x))
        return output

    def flops(self, length: int, num_blocks: int, slots: int) -> int:
        """Return the operations for one sequence.

        Args:
            length: Positions of the context.
            num_blocks: Number of blocks.
            slots: Slots of a block.
        """
        attention, count = self.layer.attention, num_blocks * slots
        width = attention.out.in_features
        projected = attention.qkv.weight.numel() * (length + count) + attention.out.weight.numel() * count
        return 2 * (projected + 2 * width * count * (length + slots)) + self.layer.ffn.flops(count)
