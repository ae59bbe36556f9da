"""Chained heads: one transformer layer per horizon, each on top of the other, an ablation of Gloeckle et al. 2024."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from mtp_modules.core.checks import at_least, refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.core.targets import at_positions, same_document_keys
from mtp_modules.heads.common import picked_rows
from mtp_modules.heads.parallel import ParallelState
from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.last_hidden import LastHiddenState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer

ORDERS = ("causal", "anticausal")


class ChainedHeads(Heads):
    """Predict the horizons along a chain of transformer layers, one per horizon, followed by one shared norm.

    ``causal``: the layer of horizon 1 reads the trunk, and each further layer reads the output of the previous horizon.
    ``anticausal``: the layer of the farthest horizon reads the trunk, and each nearer layer reads the output of the
    next farther horizon, down to horizon 1. Gloeckle et al. 2024 (arXiv 2404.19737), the ablation over head
    architectures.

    In the anticausal order horizon 1 depends on all layers: plain decoding runs all of them, and drafts cost nothing
    more. In the causal order horizon 1 costs one layer, and a chunk after which the heads draft costs all of them.
    Layers attend to every position, so if far horizons are trained at some positions only, only the last causal layer
    does less work. A loss that detaches the trunk from far horizons runs the layers up to horizon 1 twice.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        num_heads: Query heads per layer.
        order: ``"causal"`` or ``"anticausal"``.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layers; 8/3 of ``d_model``, rounded up to a multiple of 64, if
            ``None``.
        max_positions: Maximum sequence length.

    Shape:
        hidden ``(B, T, D)`` -> horizon 1 ``(B, T, D)``, the others ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1 or does not divide, the order is unknown, or a sequence is longer than
            ``max_positions``.

    Example:
        >>> heads = ChainedHeads(d_model=32, num_horizons=3, num_heads=4, order="anticausal", max_positions=64)
        >>> [state.shape for state in heads(torch.zeros(1, 5, 32))]
        [torch.Size([1, 5, 32]), torch.Size([1, 5, 32]), torch.Size([1, 5, 32])]
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_heads: int,
        order: str = "causal",
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        max_positions: int = 2048,
    ) -> None:
        super().__init__()
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("num_heads", num_heads),
            ("max_positions", max_positions),
        ):
            at_least(self, name, value, 1)
        if order not in ORDERS:
            refuse(self, f"order must be one of {', '.join(ORDERS)}, got {order!r}.")
        self.d_model, self.order, self.max_positions = d_model, order, max_positions
        self.rotary = RotaryPositions(d_model // num_heads, max_positions)
        layers = (
            TransformerLayer(
                d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, ffn_width=ffn_width, depth=num_horizons
            )
            for _ in range(num_horizons)
        )
        self.layers = cast("Sequence[TransformerLayer]", nn.ModuleList(layers))
        self.norm = RMSNorm(d_model)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1 .. H."""
        return tuple(range(1, len(self.layers) + 1))

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers, one per horizon, nearest first."""
        return tuple(self.layers)

    @property
    def _chain(self) -> list[int]:
        """Indices of the horizons in the order in which their layers run."""
        indices = list(range(len(self.layers)))
        return indices if self.order == "causal" else indices[::-1]

    @property
    def _up_to_first(self) -> int:
        """How many layers horizon 1 needs."""
        return 1 if self.order == "causal" else len(self.layers)

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
        length = hidden.shape[1]
        within_positions(self, length, self.max_positions, "heads")
        seen = None if document_ids is None else same_document_keys(document_ids)
        mask, table = None if seen is None else seen[:, None], self.rotary(None, length, hidden)
        x = hidden if far_hidden is None else far_hidden
        states = [x] * len(self.layers)
        for index in self._chain:
            if positions is None or index == 0:
                x = self.layers[index](x, table, mask)
                states[index] = self.norm(x)
            elif index == self._chain[-1]:
                rows = picked_rows(positions, seen, length)
                picked_table = self.rotary(positions, positions.shape[1], hidden)
                states[index] = self.norm(self.layers[index](x, table, rows, at_positions(x, positions), picked_table))
            else:
                x = self.layers[index](x, table, mask)
                states[index] = self.norm(at_positions(x, positions))
        first = states[0] if far_hidden is None else self._first(hidden, table, mask)
        return (first, *states[1:])

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return horizon 1's state at every position: the output of one layer if causal, else of all of them."""
        within_positions(self, hidden.shape[1], self.max_positions, "heads")
        mask = None if document_ids is None else same_document_keys(document_ids)[:, None]
        return self._first(hidden, self.rotary(None, hidden.shape[1], hidden), mask)

    def _first(
        self, x: Float[Tensor, "B T D"], table: tuple[Tensor, Tensor], mask: Bool[Tensor, "B 1 T T"] | None
    ) -> Float[Tensor, "B T D"]:
        for index in self._chain[: self._up_to_first]:
            x = self.layers[index](x, table, mask)
        return self.norm(x)

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of the layers, of which only the last causal one can skip positions."""
        run = self._chain if num_far else self._chain[: self._up_to_first]
        skipping = run[-1:] if run[-1] > 0 else []
        return sum(self.layers[index].flops(num_far if index in skipping else length, length) for index in run)

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> ParallelState:
        """Make an empty state."""
        attention = self.layers[0].attention
        keys_values = KeyValueState(
            batch_size,
            capacity,
            num_layers=len(self.layers) if for_drafts else self._up_to_first,
            num_kv_heads=attention.local_kv_heads,
            head_dim=attention.head_dim,
            like=self.norm.weight,
            max_positions=self.max_positions,
        )
        return ParallelState(keys_values, LastHiddenState(batch_size, capacity))

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append the announced chunk, keep the states for drafting, and return the states of horizon 1."""
        own = self._own(state)
        table = self.rotary(own.keys_values.positions, hidden.shape[1], hidden)
        x, states = hidden, [hidden] * len(self.layers)
        for index in self._chain[: own.keys_values.num_layers]:
            x = self.layers[index].extend(x, table, own.keys_values, index)
            states[index] = self.norm(x)
        own.hidden.append(torch.cat(states, dim=-1))
        return states[0]

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
        """Return the next horizon's state at the last position, computed by ``read``; ignores ``tokens``."""
        start = (depth + 1) * self.d_model
        return self._own(state).hidden.last[:, None, start : start + self.d_model]

    def _own(self, state: DecodingState) -> ParallelState:
        if not isinstance(state, ParallelState):
            refuse(self, f"state must come from these heads' new_state, got {type(state).__name__}.")
        return state
