"""A KV cache for ``transformers`` over preallocated slots, which masks rejected tokens. Imports ``transformers``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtp_modules.core.selection import moved
from mtp_modules.core.shapes import Bool, Float, Int, Tensor
from mtp_modules.core.targets import same_document_keys
from mtp_modules.layers.cache import KeyValueState

ATTENTION = "mtp_modules"
"""Name of an attention implementation: torch's own attention, with masks by the positions of a state's tokens."""

_READING: ContextVar["HuggingFaceState | PackedRows | None"] = ContextVar("reading", default=None)


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed by mypy
    """KV cache of one layer, one slot per position. Sliding windows are left to the mask, so nothing is dropped.

    Args:
        state: Defines the slots of a chunk.
    """

    is_sliding = False

    def __init__(self, state: "HuggingFaceState") -> None:
        super().__init__()
        self.state = state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots, once the shapes are known."""
        self.keys, self.values = (
            part.new_zeros(*part.shape[:2], self.state.capacity, part.shape[3]) for part in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Float[Tensor, "B h T d"], value_states: Float[Tensor, "B h T e"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "B h S d"], Float[Tensor, "B h S e"]]:
        """Write the chunk's keys and values, and return all slots that its queries may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.state.write(self.keys, key_states), self.state.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots that a chunk attends to, and the first of them."""
        return self.state.end, 0

    def get_seq_length(self) -> int:
        """Return the committed tokens of the longest row."""
        return max(self.state.lengths)

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.state.capacity


class HuggingFaceState(KeyValueState):
    """A state whose KV cache is held by the layers of a ``transformers`` cache, each with its own shapes.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Maximum number of tokens of a row, the chunk included.
        num_caches: Number of layers with a KV cache.
        like: A tensor on the device of the trunk.
        max_positions: Maximum number of committed tokens of a row.
    """

    def __init__(
        self, batch_size: int, capacity: int, *, num_caches: int, like: Tensor, max_positions: int | None
    ) -> None:
        super().__init__(
            batch_size, capacity, num_layers=0, num_kv_heads=1, head_dim=1, like=like, max_positions=max_positions
        )
        self.slot_layers = [SlotLayer(self) for _ in range(num_caches)]
        self.cache = Cache(layers=list(self.slot_layers))

    @property
    def end(self) -> int:
        """Number of slots that the announced chunk attends to, its own included."""
        return max(self.lengths) + self.chunk

    def write(self, slots: Float[Tensor, "_ h _ d"], new: Float[Tensor, "B h T d"]) -> Float[Tensor, "B h S d"]:
        """Write the announced chunk, and return the slots up to its end; without gradients.

        Args:
            slots: Of a layer.
            new: Keys or values of the chunk.
        """
        slots = slots[: len(self.lengths)]
        if self._ragged:
            slots[self._rows, :, self._slots] = new.detach().transpose(1, 2)
        else:
            slots[:, :, self._slots[0]] = new.detach()
        return slots[:, :, : self.end]

    def allowed(
        self, may_see: Callable[..., Bool[Tensor, "B 1 T S"]], batch_size: int
    ) -> Bool[Tensor, "B 1 T S"] | None:
        """Return which slots each token of the chunk may attend to; ``None`` if the model's own mask is right.

        Args:
            may_see: The layer's own rule: from row, head, position of the query and of the key to a mask.
            batch_size: Number ``B`` of rows.
        """
        if self.mask is None:
            return None
        places = torch.arange(self.end, device=self.mask.device)[None]
        if self.parents is not None:
            places = places.expand(batch_size, -1).scatter(1, self._slots.expand(batch_size, -1), self.positions)
        rows = torch.arange(batch_size, device=self.mask.device)[:, None, None, None]
        ruled = may_see(rows, torch.zeros_like(rows[:1]), self.positions[:, None, :, None], places[:, None, None])
        return (ruled & self.mask).expand(batch_size, -1, -1, -1)

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the chunk, or of the path in it, in row ``b``."""
        if path is not None:
            starts = torch.tensor(self.lengths, device=path.device)[:, None]
            source, target = starts + path, starts + torch.arange(path.shape[1], device=path.device)
            for layer in self.slot_layers:
                for kept in (layer.keys, layer.values):
                    kept[self._rows, :, target] = kept[self._rows, :, source]
        super().commit(keep, path)

    def select(self, rows: list[int]) -> None:
        """Keep only some of the rows."""
        super().select(rows)
        places, sources = moved(rows)
        for layer in self.slot_layers:
            if not layer.is_initialized:
                continue
            if len(rows) > len(layer.keys):
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            elif places:
                for kept in (layer.keys, layer.values):
                    kept[places] = kept[sources]


class PackedRows:
    """Rows of several documents, which do not attend to each other.

    Args:
        document_ids: Which document every token belongs to.
    """

    def __init__(self, document_ids: Int[Tensor, "B T"]) -> None:
        self.mask = same_document_keys(document_ids)[:, None]

    def allowed(self, may_see: Callable[..., Bool[Tensor, "B 1 T T"]], batch_size: int) -> Bool[Tensor, "B 1 T T"]:
        """Return which places each token may attend to; see :meth:`HuggingFaceState.allowed`.

        Args:
            may_see: The layer's own rule.
            batch_size: Number ``B`` of rows.
        """
        rows = torch.arange(batch_size, device=self.mask.device)[:, None, None, None]
        places = torch.arange(self.mask.shape[-1], device=self.mask.device)
        return may_see(rows, torch.zeros_like(rows[:1]), places[:, None], places) & self.mask


@contextmanager
def reading(what: HuggingFaceState | PackedRows) -> Iterator[None]:
    """Use the masks of a state, or of packed rows, in forward passes inside this context.

    Args:
        what: Defines the mask.
    """
    token = _READING.set(what)
    try:
        yield
    finally:
        _READING.reset(token)


def mask_by_positions(
    *, batch_size: int, mask_function: Callable[..., Tensor], **given: Any
) -> Bool[Tensor, "B 1 T S"] | None:
    """Return the mask of a kind of layers: that of the current state or packed rows, or torch's own.

    Args:
        batch_size: Number ``B`` of rows.
        mask_function: The rule of these layers.
        given: Other arguments of ``transformers``.
    """
    read = _READING.get()
    found = None if read is None else read.allowed(mask_function, batch_size)
    if found is not None:
        return found
    ordinary: Tensor | None = sdpa_mask(batch_size=batch_size, mask_function=mask_function, **given)
    return ordinary


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, mask_by_positions)


def caches_of(config: Any) -> int | None:
    """Return the number of layers with a KV cache; ``None`` if some have a state that cannot be rolled back.

    Args:
        config: Of a model of ``transformers``.
    """
    layers = DynamicCache(config=config).layers
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return len(layers)
    return None
