"""The heads of Gloeckle et al. 2024: one transformer layer per horizon."""

from collections.abc import Callable, Sequence
from typing import cast

from torch import nn

from mtp_modules.core.checks import at_least, refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Heads
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.state import StaticMemory
from mtp_modules.core.targets import at_positions, horizon_of_draft, leaping_horizons, same_document_keys
from mtp_modules.heads.common import picked_rows
from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.last_hidden import LastHiddenState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer


class ParallelState(DecodingState):
    """The KV cache of every head's layer, and the states at each row's last token from which the heads draft.

    Args:
        keys_values: One layer per head.
        hidden: The trunk's hidden state at the last token; for chained layers, the states of all horizons there.
    """

    def __init__(self, keys_values: KeyValueState, hidden: LastHiddenState) -> None:
        self.keys_values = keys_values
        self.hidden = hidden
        self.lengths = keys_values.lengths

    def begin(self, chunk: int) -> None:
        """Announce a chunk."""
        self.keys_values.begin(chunk)
        self.hidden.begin(chunk)

    def dynamic_axes(self) -> list[tuple[Tensor, int]]:
        """Return the axes of the KV cache."""
        return self.keys_values.dynamic_axes()

    def for_graphs(self, memory: StaticMemory | None = None) -> None:
        """Prepare the KV cache."""
        self.keys_values.for_graphs(memory)

    def prepare_drafts(self) -> None:
        """Compute, once per round, what the queries of drafts attend to."""
        self.keys_values.prepare_drafts()

    def expect_tree(self, parents: Int[Tensor, "B C"], depth: int) -> None:
        """Announce that the next chunk is a tree."""
        self.keys_values.expect_tree(parents, depth)
        self.hidden.expect_tree(parents, depth)

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the chunk, or of the path in it, in row ``b``."""
        self.keys_values.commit(keep, path)
        self.hidden.commit(keep, path)
        self.lengths = self.keys_values.lengths

    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only."""
        self.keys_values.select(rows)
        self.hidden.select(rows)
        self.lengths = self.keys_values.lengths


class ParallelHeads(Heads):
    """Predict every horizon with its own transformer layer on the trunk's hidden state, then one shared norm.

    Gloeckle et al. 2024 (arXiv 2404.19737), section 2. For the paper's exact architecture, set the trunk's
    ``final_norm: false`` and give it one layer less for each extra head.

    Args:
        d_model: Width ``D`` of the trunk's hidden state.
        num_horizons: How many future tokens ``H`` each position predicts.
        num_heads: Query heads per layer.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``.
        ffn_width: Inner width of the feed-forward layers; 8/3 of ``d_model`` if ``None``.
        max_positions: Maximum sequence length.
        rope_base: Base of the rotary positions.
        norm_eps: Added to the mean square in every norm.
        stride: Distance from each horizon to the next: 1 for 1 .. H, 2 for 1, 3, 5 and so on (L-MTP, arXiv 2505.17505).
            Drafts between two horizons come from earlier positions, whose horizons reach those tokens.

    Shape:
        hidden ``(B, T, D)`` -> horizon 1 ``(B, T, D)``, the others ``(B, P, D)``.

    Raises:
        ValueError: If a size is below 1 or does not divide.

    Example:
        >>> import torch
        >>> heads = ParallelHeads(d_model=32, num_horizons=2, num_heads=4, max_positions=64)
        >>> [state.shape for state in heads(torch.zeros(1, 3, 32))]
        [torch.Size([1, 3, 32]), torch.Size([1, 3, 32])]
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_horizons: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        max_positions: int = 2048,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
        stride: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("d_model", d_model),
            ("num_horizons", num_horizons),
            ("num_heads", num_heads),
            ("max_positions", max_positions),
            ("stride", stride),
        ):
            at_least(self, name, value, 1)
        self.d_model, self.max_positions, self.stride = d_model, max_positions, stride
        self.rotary = RotaryPositions(d_model // num_heads, max_positions, base=rope_base)
        layers = (
            TransformerLayer(
                d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, ffn_width=ffn_width, norm_eps=norm_eps
            )
            for _ in range(num_horizons)
        )
        self.layers = cast("Sequence[TransformerLayer]", nn.ModuleList(layers))
        self.norm = RMSNorm(d_model, eps=norm_eps)

    @property
    def horizons(self) -> tuple[int, ...]:
        """1, 1 + stride, 1 + 2 stride and so on."""
        return leaping_horizons(len(self.layers), self.stride)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers, one per head."""
        return tuple(self.layers)

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
        table = self.rotary(None, length, hidden)
        seen = None if document_ids is None else same_document_keys(document_ids)
        mask = None if seen is None else seen[:, None]
        first = self.norm(self.layers[0](hidden, table, mask))
        far = hidden if far_hidden is None else far_hidden
        if positions is None:
            return (first, *(self.norm(layer(far, table, mask)) for layer in self.layers[1:]))
        rows = picked_rows(positions, seen, length)
        picked, picked_table = at_positions(far, positions), self.rotary(positions, positions.shape[1], hidden)
        return (
            first,
            *(self.norm(layer(far, table, rows, picked, picked_table)) for layer in self.layers[1:]),
        )

    def first(
        self, hidden: Float[Tensor, "B T D"], *, document_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the output of horizon 1's layer at every position."""
        within_positions(self, hidden.shape[1], self.max_positions, "heads")
        mask = None if document_ids is None else same_document_keys(document_ids)[:, None]
        return self.norm(self.layers[0](hidden, self.rotary(None, hidden.shape[1], hidden), mask))

    def flops(self, length: int, num_far: int) -> int:
        """Return the operations of one layer per horizon; all of them compute keys and values at every position."""
        near, *far = self.layers
        return near.flops(length, length) + sum(layer.flops(num_far, length) for layer in far if num_far)

    def new_state(self, batch_size: int, capacity: int, *, for_drafts: bool = True) -> ParallelState:
        """Make an empty state."""
        attention = self.layers[0].attention
        keys_values = KeyValueState(
            batch_size,
            capacity,
            num_layers=len(self.layers) if for_drafts else 1,
            num_kv_heads=attention.local_kv_heads,
            head_dim=attention.head_dim,
            like=self.norm.weight,
            max_positions=self.max_positions,
        )
        return ParallelState(keys_values, LastHiddenState(batch_size, capacity, count=self.stride))

    def read(
        self,
        hidden: Float[Tensor, "B T D"],
        state: DecodingState,
        *,
        tokens: Int[Tensor, "B T"] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Append the announced chunk, and return the states of horizon 1.

        Heads beyond the first cache keys and values of the whole chunk, but compute outputs only when they draft.
        """
        keys_values = self._own(state).keys_values
        table = self.rotary(keys_values.positions, hidden.shape[1], hidden)
        first = self.norm(self.layers[0].extend(hidden, table, keys_values, 0))
        for index, layer in enumerate(self.layers[1 : keys_values.num_layers], start=1):
            _, keys, values = layer.attention.project(layer.attention_norm(hidden), table)
            keys_values.append(index, keys, values)
        self._own(state).hidden.append(hidden)
        return first

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
        """Return a horizon's state at the last position, or at an earlier one if it leaps; ignores ``tokens``."""
        index, back = horizon_of_draft(self.horizons, depth)
        own, layer = self._own(state), self.layers[index]
        hidden = own.hidden.back(back)[:, None]
        keys, values, positions, mask = own.keys_values.last(index, back)
        queries, _, _ = layer.attention.project(layer.attention_norm(hidden), self.rotary(positions, 1, hidden))
        x = hidden + layer.attention.attend(queries, keys, values, layer.attention.folded(mask))
        return self.norm(x + layer.ffn(layer.ffn_norm(x)))

    def _own(self, state: DecodingState) -> ParallelState:
        if not isinstance(state, ParallelState):
            refuse(self, f"state must come from these heads' new_state, got {type(state).__name__}.")
        return state
