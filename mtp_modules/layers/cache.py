"""The KV cache of the tokens read so far, with room for a provisional chunk."""

from typing import NamedTuple

import torch

from mtp_modules.core.drafts import ancestors_of
from mtp_modules.core.selection import moved
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.core.state import StaticMemory, bucket_of
from mtp_modules.layers.chunks import ChunkedState


class _LookBack(NamedTuple):
    """What a query at each row's last committed token sees: cache slots ``(S,)``, positions ``(B, 1)``, and a mask."""

    seen: Tensor
    positions: Tensor
    mask: Tensor | None

    @property
    def dynamic_axes(self) -> list[tuple[Tensor, int]]:
        return [(self.seen, 0)] if self.mask is None else [(self.seen, 0), (self.mask, 3)]


class KeyValueState(ChunkedState):
    """Preallocated KV cache of several attention layers.

    Rejected entries stay in the cache but are masked: the mask ends at each row's own length, and the next chunk
    overwrites them.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Maximum tokens per row, the chunk included.
        num_layers: Number of layers in this cache.
        num_kv_heads: Key-value heads per layer.
        head_dim: Width of one head.
        like: A tensor with the dtype and device of the cache.
        max_positions: Maximum tokens that a row can keep; larger positions of a chunk are clamped to the last one.
        num_previous: How many tokens before each position the trunk embeds along with it.
        padding: Token id to use before the first token.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        like: Tensor,
        max_positions: int | None = None,
        num_previous: int = 0,
        padding: int = 0,
    ) -> None:
        super().__init__(batch_size, capacity, max_positions=max_positions)
        self.num_layers, self._allocated_rows, self._in_graphs = num_layers, batch_size, False
        self._memory: StaticMemory | None = None
        # One run of slots, layer by layer and row by row, because compiled code can write by index in place. One slot
        # per row stays unused, so that a chunk never sees all slots, which torch.compile would treat as another case.
        shape = (num_layers * batch_size * (capacity + 1), num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.positions: Int[Tensor, "#B T"] = torch.empty(0)
        self.mask: Bool[Tensor, "#B 1 T S"] | None = None
        self._seen: Int[Tensor, " S"] = torch.empty(0)
        self._folded: Float[Tensor, "#B 1 _ S"] | None = None
        self._back: _LookBack | None = None
        self._rows = torch.arange(batch_size, device=like.device)[:, None]
        self._layers = self._by_layer()
        self.num_previous = num_previous
        self.tokens = torch.full((batch_size, num_previous + capacity), padding, device=like.device)
        self._unreported = self._storage

    def begin(self, chunk: int) -> None:
        """Announce a chunk: compute its positions and attention mask."""
        super().begin(chunk)
        self._folded = None
        self._ragged = self._needs_ragged()
        device = self._rows.device
        span = self.span(max(self.lengths) + chunk)
        if span != len(self._seen):
            self._seen = torch.arange(span, device=device)
        if not self._ragged:
            start = self.lengths[0]
            self._new = torch.arange(start, start + chunk, device=device)
            self._slots = self._new[None]
        else:
            starts = torch.tensor(self.lengths, device=device)
            self._slots = starts[:, None] + torch.arange(chunk, device=device)
        self._places = (self._rows * (self.capacity + 1) + self._slots).flatten()
        self.positions = self._slots
        if self.parents is not None:
            self._place_tree(self.parents)
        elif chunk == 1 and not self._ragged:
            self.mask = None
        else:
            self.mask = self._seen <= self._slots[:, None, :, None]
        if self.max_positions is not None:
            self.positions = self.positions.clamp(max=self.max_positions - 1)

    def for_graphs(self, memory: StaticMemory | None = None) -> None:
        """Treat several rows as ragged even if their lengths are equal.

        Args:
            memory: Holds keys, values and tokens. The number of slots that chunks attend to is then rounded up to one
                of a few sizes; a mask hides the slots beyond each row's end.
        """
        self._in_graphs, self._memory = True, memory
        if memory is not None:
            empty = self.tokens
            self.keys, self.values, self.tokens = (
                memory.tensor(name, tuple(part.shape), part)
                for name, part in (("keys", self.keys), ("values", self.values), ("tokens", self.tokens))
            )
            self.keys.zero_()
            self.values.zero_()
            self.tokens.copy_(empty)
        self._layers, self._unreported = self._by_layer(), self._storage

    def span(self, length: int) -> int:
        """Return how many slots per row attention reads.

        Args:
            length: How many of them are in use.
        """
        return length if self._memory is None else min(self.capacity, bucket_of(length))

    def _needs_ragged(self) -> bool:
        return (
            self._memory is not None
            or min(self.lengths) != max(self.lengths)
            or (self._in_graphs and len(self.lengths) > 1)
        )

    @property
    def _storage(self) -> list[tuple[Tensor, int]]:
        return [] if self._memory is not None else [(self.tokens, 1), (self.keys, 0), (self.values, 0)]

    def dynamic_axes(self) -> list[tuple[Tensor, int]]:
        """Return keys, values and tokens once, and the positions and masks of each chunk and of each draft."""
        axes, self._unreported = [*self._unreported, (self._seen, 0)], []
        if self.mask is not None:
            axes.append((self.mask, 3))
        return axes if self._back is None else axes + self._back.dynamic_axes

    def folded_mask(self, groups: int) -> Float[Tensor, "#B 1 _ S"] | None:
        """Return the additive mask of the chunk's queries, computed once for all layers; ``None`` if nothing is masked.

        Args:
            groups: How many queries share a key-value head, folded one after the other.
        """
        if self.mask is None:
            return None
        if self._folded is None:
            additive = torch.zeros(self.mask.shape, dtype=self.keys.dtype, device=self.mask.device)
            additive = additive.masked_fill_(~self.mask, -torch.inf)
            self._folded = additive[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
        return self._folded

    def expect_tree(self, parents: Int[Tensor, "B C"], depth: int) -> None:
        """Announce that the next chunk is a tree."""
        self.parents, self.depth = parents, depth

    def _place_tree(self, parents: Int[Tensor, "B C"]) -> None:
        """Set positions and mask: a token follows its parent, and sees committed tokens, its ancestors and itself."""
        ancestors = ancestors_of(parents)
        starts = torch.tensor(self.lengths, device=parents.device)[:, None]
        self.positions = starts + ancestors.sum(dim=2) - 1
        offsets = self._seen - starts
        inside = (offsets >= 0) & (offsets < self.chunk)
        own = ancestors.gather(2, offsets.clamp(0, self.chunk - 1)[:, None].expand(-1, self.chunk, -1))
        self.mask = ((offsets < 0)[:, None] | (inside[:, None] & own))[:, None]

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the chunk, or of the path in it, in row ``b``."""
        if path is not None:
            starts = torch.tensor(self.lengths, device=path.device)[:, None]
            source, target = starts + path, starts + torch.arange(path.shape[1], device=path.device)
            for kept in (self._by_row(self.keys), self._by_row(self.values)):
                kept[:, self._rows, target] = kept[:, self._rows, source]
            self.tokens[self._rows, self.num_previous + target] = self.tokens[self._rows, self.num_previous + source]
        super().commit(keep, path)
        self._back = None

    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only."""
        super().select(rows)
        self._back = None
        fits = len(rows) == self._allocated_rows if self._in_graphs else len(rows) <= self._allocated_rows
        if fits:  # a graph expects exactly one number of allocated rows
            (places, sources), used = moved(rows), max(self.lengths)
            for kept in (self.keys, self.values) if places else ():
                by_row = self._by_row(kept)
                by_row[:, places, :used] = by_row[:, sources, :used]
        else:
            self.keys, self.values = (
                self._stored(name, self._by_row(kept)[:, rows].flatten(0, 2))
                for name, kept in (("keys", self.keys), ("values", self.values))
            )
            self._allocated_rows = len(rows)
        self._rows = torch.arange(len(rows), device=self._rows.device)[:, None]
        self._layers = self._by_layer()
        self.tokens = self._stored("tokens", self.tokens[rows])
        self._unreported = self._storage

    def _stored(self, name: str, kept: Tensor) -> Tensor:
        """Copy a tensor to the static memory, if there is one."""
        if self._memory is None:
            return kept
        return self._memory.tensor(name, tuple(kept.shape), kept).copy_(kept)

    def previous_tokens(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T C"]:
        """Write the chunk's tokens, and return for each position the ``C`` tokens before it, nearest first.

        Args:
            tokens: The announced chunk.
        """
        self.tokens[self._rows, self._slots + self.num_previous] = tokens
        if self.parents is None:
            before = torch.arange(self.num_previous - 1, -1, -1, device=tokens.device)
            return self.tokens[self._rows[:, :, None], self._slots[:, :, None] + before]
        starts = self._slots[:, :1] + self.num_previous
        at, previous = self._slots + self.num_previous, []
        for _ in range(self.num_previous):
            inside = at >= starts
            parent = self.parents.gather(1, (at - starts).clamp(min=0).expand(len(tokens), -1))
            at = torch.where(inside & (parent >= 0), starts + parent, torch.where(inside, starts, at) - 1)
            previous.append(self.tokens[self._rows, at])
        return torch.stack(previous, dim=2)

    def append(
        self, layer: int, keys: Float[Tensor, "B h T d"], values: Float[Tensor, "B h T d"]
    ) -> tuple[Float[Tensor, "B h S d"], Float[Tensor, "B h S d"]]:
        """Write one layer's keys and values of the chunk, and return all that its queries attend to; no gradients.

        Args:
            layer: Index of the layer.
            keys: Keys of the chunk.
            values: Values of the chunk.
        """
        if torch.compiler.is_compiling() or self._ragged:
            places = self._places + layer * (self.keys.shape[0] // self.num_layers)
            for kept, new in ((self.keys, keys), (self.values, values)):
                kept.index_copy_(0, places, new.detach().transpose(1, 2).flatten(0, 1))
        else:  # fewer calls, which matters in a decoding step of a small model
            for kept, new in zip(self._layers[layer], (keys, values), strict=True):
                kept.index_copy_(2, self._new, new.detach())
        return self._until(len(self._seen), layer)

    def _by_row(self, kept: Float[Tensor, "_ h d"]) -> Float[Tensor, "L B _ h d"]:
        """Return the slots of all allocated rows; the rows in use come first."""
        slots = kept.shape[0] // (self.num_layers * self._allocated_rows) if self.num_layers else self.capacity + 1
        return kept.view(self.num_layers, self._allocated_rows, slots, *kept.shape[1:])

    def _by_layer(self) -> list[tuple[Float[Tensor, "B h _ d"], Float[Tensor, "B h _ d"]]]:
        """Return views of every layer's slots, for eager code only: a graph would treat each as a separate tensor."""
        if self._memory is not None:
            return []
        count = len(self._rows)
        keys, values = (self._by_row(kept)[:, :count].transpose(2, 3).unbind() for kept in (self.keys, self.values))
        return list(zip(keys, values, strict=True))

    def _until(self, end: int, layer: int) -> tuple[Float[Tensor, "B h S d"], Float[Tensor, "B h S d"]]:
        """Return a layer's keys and values in the first ``end`` slots."""
        if torch.compiler.is_compiling() or self._memory is not None:
            count = len(self._rows)
            keys, values = (
                self._by_row(kept)[layer, :count, :end].transpose(1, 2) for kept in (self.keys, self.values)
            )
        else:
            keys, values = (kept.narrow(2, 0, end) for kept in self._layers[layer])
        return keys, values

    def last(self, layer: int, back: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return keys, values, positions ``(B, 1)`` and mask for one query at each row's last committed token.

        Args:
            layer: Index of the layer.
            back: How many tokens earlier the query lies; at the row's first token if there are not that many.
        """
        self.prepare_drafts()
        assert self._back is not None
        seen, positions, mask = self._back.seen, self._back.positions, self._back.mask
        if back:
            positions = (positions - back).clamp(min=0)
            mask = seen <= positions[:, None, :, None]
        return *self._until(len(seen), layer), positions, mask

    def prepare_drafts(self) -> None:
        """Compute, once per round, what the queries of drafts attend to."""
        if self._back is not None:
            return
        seen = torch.arange(self.span(max(self.lengths)), device=self._rows.device)
        positions = torch.tensor(self.lengths, device=seen.device)[:, None] - 1
        mask = seen <= positions[:, None, :, None] if self._needs_ragged() else None
        self._back = _LookBack(seen, positions, mask)
