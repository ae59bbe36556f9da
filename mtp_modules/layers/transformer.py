"""The pre-norm transformer layer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The rows of fused matrices are laid out in groups, so that any run of whole groups is a smaller layer of the same kind.
Under tensor parallelism a process holds such a run; the shapes give its share of the heads or of the inner width.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mtp_modules.core.budget import reserve
from mtp_modules.core.checks import at_least, divides, finite, whole
from mtp_modules.core.shapes import Bool, Float, Int, Shaped, Tensor
from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.feed_forward import SwiGLU


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis and scale (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        width: Size ``D`` of the last axis.
        eps: Added to the mean square.
        gain: Initial value of every gain.
    """

    def __init__(self, width: int, *, eps: float = 1e-6, gain: float = 1.0) -> None:
        super().__init__()
        self.eps, self.gain = finite("RMSNorm", "eps (norm_eps)", eps, 0), finite("RMSNorm", "gain (norm_gain)", gain)
        self.weight = nn.Parameter(torch.full((whole("RMSNorm", "width", width, 1),), self.gain))

    def reset_parameters(self) -> None:
        """Set every gain to its initial value."""
        nn.init.constant_(self.weight, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., D)``."""
        # Under autocast x may be narrower than the gains, for which torch has no fused kernel.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RotaryPositions(nn.Module):
    """Rotate pairs of channels by an angle that grows with the position (Su et al. 2021, arXiv 2104.09864).

    Channel ``i`` is paired with channel ``i + d/2``. Tables are computed in float64, on any device and for any dtype.

    Args:
        head_dim: Width ``d`` of one head, even.
        max_positions: Maximum sequence length.
        base: Longest wavelength divided by two pi, in positions.
    """

    def __init__(self, head_dim: int, max_positions: int, *, base: float = 10000.0) -> None:
        super().__init__()
        divides("RotaryPositions", "2", 2, "head_dim", head_dim)
        reserve(head_dim * max_positions)
        self.head_dim, self.max_positions = head_dim, max_positions
        self.base = finite("RotaryPositions", "base (rope_base)", base, 0, above=True)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _table(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines, and sines with the first half negated, ``(max_positions, d)``."""
        if (device, dtype) not in self._tables:
            half = self.head_dim // 2
            with torch.inference_mode(False), torch.no_grad():
                rates = self.base ** (-torch.arange(half, dtype=torch.float64) / half)
                angles = torch.arange(self.max_positions, dtype=torch.float64)[:, None] * rates
                cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
                sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
                self._tables[device, dtype] = cos.to(device, dtype), sin.to(device, dtype)
        return self._tables[device, dtype]

    def forward(self, positions: Int[Tensor, "#B T"] | None, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the rotation of every position.

        Args:
            positions: Positions of the tokens, ``(B, T)``; ``None`` for 0 .. length - 1.
            length: Number ``T`` of tokens.
            like: A tensor whose device and dtype the tables take.

        Shape:
            Two tables ``(B or 1, T, 1, 1, d)``.
        """
        cos, sin = self._table(like.device, like.dtype)
        if positions is None:
            return cos[None, :length, None, None], sin[None, :length, None, None]
        shape, places = (*positions.shape, 1, 1, self.head_dim), positions.flatten()
        return cos.index_select(0, places).view(shape), sin.index_select(0, places).view(shape)

    @staticmethod
    def rotate(x: Float[Tensor, "B T h g d"], table: tuple[Tensor, Tensor]) -> Float[Tensor, "B T h g d"]:
        """Apply the rotation to groups of heads.

        Args:
            x: Queries and keys, ``g`` of them per key-value head.
            table: The tables that ``forward`` returned.
        """
        cos, sin = table
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245).

    The rows of ``qkv`` are ``(h, g + 2, d)``: for each key-value head, the ``g`` queries that attend to it, its key and
    its value. In decoding, the queries that share a key-value head become rows of one matrix product.

    Args:
        d_model: Width ``D``.
        num_heads: Query heads.
        num_kv_heads: Key-value heads, a divisor of ``num_heads``.
        qk_norm: Normalise every query and key before its rotation, with one gain per channel for all queries and one
            for all keys, as Qwen3 does (Henry et al. 2020, arXiv 2010.04245).
        norm_eps: Added to the mean square in these norms.
        head_dim: Width of one head; ``d_model / num_heads`` if ``None``.
        input_width: Width of the input; ``d_model``, that of the output, if ``None``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        head_dim: int | None = None,
        input_width: int | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            divides("Attention", "num_heads", num_heads, "d_model", d_model)
            head_dim = d_model // num_heads
        divides("Attention", "num_kv_heads", num_kv_heads, "num_heads", num_heads)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.groups = num_heads // num_kv_heads
        self.local_kv_heads = num_kv_heads  # fewer under tensor parallelism
        self.grouped = num_heads != num_kv_heads  # precomputed, so that torch.compile sees a plain bool
        self.qkv = nn.Linear(input_width or d_model, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, d_model, bias=False)
        self.query_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None

    def project(
        self, x: Float[Tensor, "B T D"], table: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "B h g T d"], Float[Tensor, "B h T d"], Float[Tensor, "B h T d"]]:
        """Return rotated queries, rotated keys, and values.

        Args:
            x: Normalised input.
            table: Rotations of its positions.
        """
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.groups + 2, self.head_dim)
        # narrow and select are faster than slices, which matters in a decoding step of a small model
        unrotated = qkv.narrow(3, 0, self.groups + 1)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = unrotated.narrow(3, 0, self.groups), unrotated.narrow(3, self.groups, 1)
            unrotated = torch.cat((self.query_norm(queries), self.key_norm(keys)), dim=3)
        rotated = RotaryPositions.rotate(unrotated, table).permute(0, 2, 3, 1, 4)
        values = qkv.select(3, self.groups + 1).transpose(1, 2)
        return rotated.narrow(2, 0, self.groups), rotated.select(2, self.groups), values

    def attend(
        self,
        queries: Float[Tensor, "B h g T d"],
        keys: Float[Tensor, "B h S d"],
        values: Float[Tensor, "B h S d"],
        mask: Shaped[Tensor, "#B 1 _ S"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Attend with each group of queries folded into the rows of its key-value head.

        Args:
            queries: Rotated queries.
            keys: Rotated keys.
            values: Values.
            mask: Boolean mask, True where a query attends, or additive mask, folded like the queries (:meth:`folded`);
                ``None`` if every query attends to all keys.
        """
        batch, _, _, length, _ = queries.shape
        output = F.scaled_dot_product_attention(queries.flatten(2, 3), keys, values, attn_mask=mask)
        output = output.view(batch, -1, length, self.head_dim).transpose(1, 2)
        return self.out(output.reshape(batch, length, -1))

    def folded(self, mask: Bool[Tensor, "#B 1 T S"] | None) -> Bool[Tensor, "#B 1 _ S"] | None:
        """Return the mask for queries that are folded into rows.

        Args:
            mask: True where a query attends.
        """
        return mask if mask is None or self.groups == 1 else mask.repeat(1, 1, self.groups, 1)

    def forward(
        self, x: Float[Tensor, "B T D"], table: tuple[Tensor, Tensor], mask: Bool[Tensor, "#B 1 T T"] | None
    ) -> Float[Tensor, "B T D"]:
        """Attend causally within whole sequences.

        Args:
            x: Normalised input.
            table: Rotations of its positions.
            mask: True where a query attends; ``None`` for the causal mask.
        """
        batch, length, _ = x.shape
        queries, keys, values = self.project(x, table)
        output = F.scaled_dot_product_attention(
            queries.flatten(1, 2), keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.out(output.transpose(1, 2).reshape(batch, length, -1))

    def flops(self, num_queries: int, num_keys: int) -> int:
        """Return the floating-point operations of one sequence.

        Args:
            num_queries: Positions with a query.
            num_keys: Positions with a key and a value.
        """
        width, keys_and_values = self.out.in_features, self.qkv.out_features - self.out.in_features
        projected = self.qkv.in_features * (width * num_queries + keys_and_values * num_keys)
        attended = 2 * width * num_queries * num_keys
        return 2 * (projected + attended + width * self.out.out_features * num_queries)


class TransformerLayer(nn.Module):
    """One pre-norm layer: attention and a gated feed-forward layer, each with a residual connection.

    Args:
        d_model: Width ``D``.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layer; 8/3 of ``d_model`` rounded up to a multiple of 64 if ``None``.
        depth: Number of layers in the stack; the matrices that write to the residual stream are initialised smaller
            by ``1/sqrt(2 depth)``.
        qk_norm: Normalise queries and keys; see :class:`Attention`.
        norm_eps: Added to the mean square in every norm.
        head_dim: Width of one head; ``d_model / num_heads`` if ``None``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        depth: int = 1,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "ffn_width": ffn_width, "head_dim": head_dim}
        for name, value in sizes.items():
            if value is not None:
                at_least("TransformerLayer", name, value, 1)
        self.depth = depth
        self.attention_norm = RMSNorm(d_model, eps=norm_eps)
        self.attention = Attention(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            head_dim=head_dim,
        )
        self.ffn_norm = RMSNorm(d_model, eps=norm_eps)
        self.ffn = SwiGLU(d_model, hidden=ffn_width or 64 * -(-8 * d_model // (3 * 64)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every matrix with variance 1/fan-in; those that write to the residual stream smaller."""
        for linear, gain in (
            (self.attention.qkv, 1.0),
            (self.attention.out, (2 * self.depth) ** -0.5),
            (self.ffn.gate_up, 1.0),
            (self.ffn.down, (2 * self.depth) ** -0.5),
        ):
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        table: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "#B 1 _ T"] | None = None,
        picked: Float[Tensor, "B P D"] | None = None,
        picked_table: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """Process whole sequences, and return the output at all positions or only at the picked ones.

        Args:
            x: Residual stream.
            table: Rotations of its positions.
            mask: True where a query attends; ``None`` for the causal mask. Required for picked positions.
            picked: The residual stream at the positions to return; all if ``None``. Keys and values still come from
                all positions.
            picked_table: Rotations of the picked positions.
        """
        if picked is None or picked_table is None:
            x = x + self.attention(self.attention_norm(x), table, mask)
        else:
            _, keys, values = self.attention.project(self.attention_norm(x), table)
            queries, _, _ = self.attention.project(self.attention_norm(picked), picked_table)
            x = picked + self.attention.attend(queries, keys, values, self.attention.folded(mask))
        return x + self.ffn(self.ffn_norm(x))

    def extend(
        self, x: Float[Tensor, "B T D"], table: tuple[Tensor, Tensor], state: KeyValueState, layer: int
    ) -> Float[Tensor, "B T D"]:
        """Append a chunk to the state's KV cache and process it.

        Args:
            x: Residual stream of the chunk.
            table: Rotations of its positions.
            state: State to which ``begin`` has announced the chunk.
            layer: Index of this layer in the state.
        """
        queries, keys, values = self.attention.project(self.attention_norm(x), table)
        keys, values = state.append(layer, keys, values)
        x = x + self.attention.attend(queries, keys, values, state.folded_mask(self.attention.groups))
        return x + self.ffn(self.ffn_norm(x))

    def flops(self, num_queries: int, num_keys: int) -> int:
        """Return the floating-point operations of one sequence.

        Args:
            num_queries: Positions with an output.
            num_keys: Positions with a key and a value.
        """
        return self.attention.flops(num_queries, num_keys) + self.ffn.flops(num_queries)
