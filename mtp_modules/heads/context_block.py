"""DFlash's heads: a block of masks whose layers attend to the whole text through inner layers of the trunk."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import same_document_keys
from mtp_modules.heads.common import last_hidden_state, needed_features, needed_future, picked_rows
from mtp_modules.heads.context_layer import ContextLayer, Table
from mtp_modules.heads.parallel import ParallelState
from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.last_hidden import LastHiddenState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer


class ContextBlockHeads(Heads):
    r"""Denoise a block of masks in one pass, with the whole text in the keys and values of every layer.

    Horizon 1 is the trunk's hidden state itself. Features of several inner layers of the trunk are fused into a context

    .. math:: c_t = \mathrm{norm}(W [f^1_t; \dots; f^n_t])

    A block is the next token :math:`x_{t+1}` and a mask for each further horizon, at the positions
    :math:`t + 1 \dots t + H`. In every layer of the drafter, the slots of the block attend to one another in both
    directions, and to the context up to :math:`t`: its keys and values are projections of :math:`c_{1 \dots t}`. The
    output at the slot of a mask is the state of its horizon. Chen et al. 2026 (DFlash, arXiv 2602.06036).

    The masks are denoised independently, so each draft's distribution does not depend on the others, and verification
    divides by it; :class:`TransitionHeads` around these heads lets them fit one another (DSpark). Training takes blocks
    at random positions with ``MultiTokenLoss(share_of_positions=...)``. Drafting fewer tokens than ``H - 1`` runs the
    same block, so the states are those of training for any number of drafts.

    With ``sample_from_anchor`` every slot predicts the token after its own: the next token's slot has the state of
    horizon 2, and the last horizon needs no slot. Released DSpark drafters do so, those of DFlash do not.

    Args:
        d_model: Width ``D`` of the trunk's hidden states and features.
        num_horizons: How many future tokens ``H`` each position predicts: the slots of a block, or one more.
        num_heads: Query heads per layer.
        num_features: How many inner layers of the trunk are fused; the trunk's ``feature_layers`` must name as many.
        num_layers: Layers of the drafter.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layers; 8/3 of ``d_model``, rounded up to a multiple of 64, if
            ``None``.
        max_positions: Maximum sequence length.
        embedding_width: Width of the trunk's token embedding; ``d_model`` if ``None``. A matrix maps another width.
        rope_base: Base of the rotary positions.
        qk_norm: Normalise every query and key before its rotation, as Qwen3 and DFlash do.
        norm_eps: Added to the mean square in every norm.
        norm_gain: Initial gain of the norm after the layers. For a pretrained trunk, use the root mean square of its
            hidden states (2.2 for SmolLM2-135M), the scale that its output matrix expects.
        head_dim: Width of one attention head; ``d_model / num_heads`` if ``None``.
        causal: Let each slot attend to the earlier slots of its block only.
        sample_from_anchor: Take the state of horizon 2 from the slot of the next token.

    Shape:
        hidden and features ``(B, T, D)``, future ``(B, P, H - 1, E)`` -> horizon 1 ``(B, T, D)``, the others
        ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1 or does not divide, ``future`` or ``features`` are missing, or a sequence is
            longer than ``max_positions``.

    Example:
        >>> heads = ContextBlockHeads(d_model=32, num_horizons=5, num_heads=4, num_features=2, max_positions=64)
        >>> features = (torch.zeros(1, 6, 32),) * 2
        >>> states = heads(torch.zeros(1, 6, 32), future=torch.zeros(1, 6, 4, 32), features=features)
        >>> len(states), states[4].shape
        (5, torch.Size([1, 6, 32]))
    """

    reads_future = True
    fuse: nn.Linear
    from_token: nn.Linear | None

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_heads: int,
        num_features: int = 3,
        num_layers: int = 2,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        max_positions: int = 2048,
        embedding_width: int | None = None,
        rope_base: float = 10000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        norm_gain: float = 1.0,
        head_dim: int | None = None,
        causal: bool = False,
        sample_from_anchor: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_width = d_model if embedding_width is None else embedding_width
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("num_heads", num_heads),
            ("num_features", num_features),
            ("num_layers", num_layers),
            ("max_positions", max_positions),
            ("embedding_width", self.embedding_width),
        ):
            at_least(self, name, value, 1)
        self.d_model, self.num_horizons, self.num_features = d_model, num_horizons, num_features
        self.max_positions, self.causal, self.sample_from_anchor = max_positions, causal, sample_from_anchor
        self.num_slots = num_horizons - 1 if sample_from_anchor else num_horizons
        if num_horizons == 1:
            return  # nothing to denoise
        self.fuse = nn.Linear(num_features * d_model, d_model, bias=False)
        self.context_norm = RMSNorm(d_model, eps=norm_eps)
        other = self.embedding_width != d_model
        self.from_token = nn.Linear(self.embedding_width, d_model, bias=False) if other else None
        self.mask = nn.Parameter(torch.empty(d_model))
        self.rotary = RotaryPositions(head_dim or d_model // num_heads, max_positions + num_horizons, base=rope_base)
        layers = (
            ContextLayer(
                TransformerLayer(
                    d_model,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    ffn_width=ffn_width,
                    depth=num_layers,
                    qk_norm=qk_norm,
                    norm_eps=norm_eps,
                    head_dim=head_dim,
                ),
                causal=causal,
            )
            for _ in range(num_layers)
        )
        self.layers = cast("Sequence[ContextLayer]", nn.ModuleList(layers))
        self.norm = RMSNorm(d_model, eps=norm_eps, gain=norm_gain)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the input maps with variance 1/fan-in, the mask with variance 1; the layers reset themselves."""
        if self.num_horizons == 1:
            return
        for linear in (self.fuse, self.from_token):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(self.mask)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, self.num_horizons + 1))

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers."""
        return tuple(self.layers) if self.num_horizons > 1 else ()

    def _context(self, features: tuple[Tensor, ...] | None) -> Float[Tensor, "B T D"]:
        context: Tensor = self.context_norm(self.fuse(torch.cat(needed_features(self, features), dim=-1)))
        return context

    def _slots(self, token: Float[Tensor, "B P E"]) -> Float[Tensor, "B P S D"]:
        """Return the block of each token: the token and the masks."""
        first = token if self.from_token is None else self.from_token(token)
        masks = self.mask.to(first.dtype).expand(*first.shape[:2], self.num_slots - 1, -1)
        return torch.cat((first[:, :, None], masks), dim=2)

    def _table(self, positions: Int[Tensor, "B P"], like: Tensor) -> Table:
        """Return the rotations of the blocks that begin after some positions."""
        offsets = torch.arange(1, self.num_slots + 1, device=positions.device)
        places = (positions[:, :, None] + offsets).flatten(1)
        return self.rotary(places, places.shape[1], like)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        *,
        far_hidden: Float[Tensor, "B T D"] | None = None,
        future: Float[Tensor, "B P K E"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        features: tuple[Float[Tensor, "B T D"], ...] | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...]:
        """Return one state a horizon; see :class:`~mtp_modules.core.interfaces.Heads`."""
        length = hidden.shape[1]
        within_positions(self, length, self.max_positions, "heads")
        if self.num_horizons == 1:
            return (hidden,)
        future = needed_future(self, future)
        every = torch.arange(length, device=hidden.device).expand(len(hidden), -1)
        picked = every if positions is None else positions
        seen = picked_rows(picked, None if document_ids is None else same_document_keys(document_ids), length)
        context, context_table = self._context(features), self.rotary(None, length, hidden)
        x, table = self._slots(future[:, :, 0]), self._table(picked, hidden)
        for layer in self.layers:
            x = layer(x, table, context, context_table, seen)
        return (hidden, *self._predicted(x).unbind(dim=2))

    def _predicted(self, x: Float[Tensor, "B P S D"]) -> Float[Tensor, "B P K D"]:
        """Return the states of the slots that predict a token."""
        states: Tensor = self.norm(x if self.sample_from_anchor else x[:, :, 1:])
        return states

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return ``hidden`` itself."""
        return hidden

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of fusing, and of all layers over one block per position; horizon 1 costs none."""
        if num_far == 0 or self.num_horizons == 1:
            return 0
        mapped = 0 if self.from_token is None else self.from_token.weight.numel() * num_far
        layers = sum(layer.flops(length, num_far, self.num_slots) for layer in self.layers)
        return 2 * (self.fuse.weight.numel() * length + mapped) + layers

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> DecodingState:
        """Make an empty state."""
        nothing = LastHiddenState(batch_size, capacity, count=0)
        if not for_drafts or self.num_horizons == 1:
            return nothing
        attention = self.layers[0].layer.attention
        keys_values = KeyValueState(
            batch_size,
            capacity,
            num_layers=len(self.layers),
            num_kv_heads=attention.local_kv_heads,
            head_dim=attention.head_dim,
            like=self.norm.weight,
            max_positions=self.max_positions,
        )
        return ParallelState(keys_values, nothing)

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        features: tuple[Float[Tensor, "B T D"], ...] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append the announced chunk to the keys and values of all layers, and return the states of horizon 1."""
        if not isinstance(state, ParallelState):
            last_hidden_state(self, state).append(hidden)
            return hidden
        keys_values, context = state.keys_values, self._context(features)
        table = self.rotary(keys_values.positions, hidden.shape[1], hidden)
        for index, layer in enumerate(self.layers):
            _, keys, values = layer.layer.attention.project(context, table)
            keys_values.append(index, keys, values)
        state.hidden.append(hidden)
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
        """Denoise the block after the last emitted token; its later states are those of the same pass."""
        if not isinstance(state, ParallelState):
            last_hidden_state(self, state)
            refuse(self, "the state was made with for_drafts=False; make one for drafts.")
        if depth == 0:
            x, table = self._slots(embed(tokens)), None
            for index, layer in enumerate(self.layers):
                keys, values, positions, mask = state.keys_values.last(index)
                table = self._table(positions, x) if table is None else table
                x = layer.attend(x, table, keys, values, mask)
            state.hidden.scratch = self._predicted(x)[:, 0]
        block: Tensor = state.hidden.scratch
        return block[:, depth : depth + 1]
