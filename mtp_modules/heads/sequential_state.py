"""The decoding state of sequential heads.

The module for horizon ``k + 1`` reads, at position ``t``, the token at ``t + k``. Its keys and values are stored in the
cache *slot* of that token, ``t + k``. So the entries of all modules are appended, committed and rolled back together
with the tokens, in chains and in trees. Rotary embeddings depend on differences of positions only, so slots can serve
as positions. The first ``k`` slots of a text belong to no position of that module, and no valid position attends to
them.
"""

from typing import NamedTuple

import torch

from mtp_modules.core.interfaces import DecodingState
from mtp_modules.core.shapes import Bool, Float, Int, Shaped, Tensor
from mtp_modules.core.state import StaticMemory
from mtp_modules.core.targets import at_positions
from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.last_hidden import LastHiddenState


class DraftPath(NamedTuple):
    """Intermediate results along the path of each draft, from the last emitted token on; never committed.

    Attributes:
        inputs: ``(B, N, S, D)``, the states that the last module has read.
        tokens: ``(B, N, S, E)``, embeddings of the last emitted token and of the drafts.
        outputs: ``(B, N, S, D)``, the states that the last module passes on.
        table: Rotations of the slots from the last emitted token on, as far as modules go, in a chain.
    """

    inputs: Float[Tensor, "B N S D"]
    tokens: Float[Tensor, "B N S E"]
    outputs: Float[Tensor, "B N S D"]
    table: tuple[Tensor, Tensor] | tuple[()] = ()

    def of(self, parents: Int[Tensor, "B N"]) -> "DraftPath":
        """Return the paths of the parents of several drafts.

        Args:
            parents: Index of each draft's parent among the previous drafts.
        """
        if self.inputs.shape[1] == parents.shape[1] == 1:
            return self
        inputs, tokens, outputs = (at_positions(part, parents) for part in self[:3])
        return DraftPath(inputs, tokens, outputs)


class SequentialState(DecodingState):
    """The KV cache of every module, and the next input of each module at each row's last token.

    Drafting writes nothing here. A chunk that is read adds one exact cache entry per token to every module, whatever
    drafted the token.

    Args:
        keys_values: One layer per module.
        hidden: The trunk's hidden state at the last token, then the outputs there of all modules but the last.
    """

    def __init__(self, keys_values: KeyValueState, hidden: LastHiddenState) -> None:
        self.keys_values = keys_values
        self.hidden = hidden
        self.lengths = keys_values.lengths
        self.path: DraftPath | None = None
        self._early: list[Bool[Tensor, "B 1 C S"] | None] = []
        self._all_begun: bool | None = None

    @property
    def num_modules(self) -> int:
        """Number of modules."""
        return self.keys_values.num_layers

    def begin(self, chunk: int) -> None:
        """Announce a chunk, and mask the slots at the start of the texts that belong to no position of a module."""
        self.keys_values.begin(chunk)
        self.hidden.begin(chunk)
        self._early = [self._early_mask(module + 1, chunk) for module in range(self.num_modules)]

    def _early_mask(self, first: int, chunk: int) -> Bool[Tensor, "B 1 C S"] | None:
        """Return the mask of a module whose positions begin in slot ``first``; ``None`` if every row has reached it.

        A slot before ``first`` sees itself, so that its output, which nothing reads, is not NaN.
        """
        if min(self.lengths) >= first:
            return None
        positions = self.keys_values.positions.expand(len(self.lengths), -1)
        starts = torch.tensor(self.lengths, device=positions.device)[:, None]
        slots = starts + torch.arange(chunk, device=positions.device)
        every = torch.arange(self.keys_values.span(max(self.lengths) + chunk), device=positions.device)
        places = every.repeat(len(self.lengths), 1).scatter(1, slots, positions)
        allowed = (places >= first)[:, None] | (every == slots[:, :, None])
        seen = self.keys_values.mask
        return allowed[:, None] if seen is None else allowed[:, None] & seen

    def dynamic_axes(self) -> list[tuple[Tensor, int]]:
        """Return the axes of the KV cache, and those of the masks at the start of a text."""
        return [*self.keys_values.dynamic_axes(), *((mask, 3) for mask in self._early if mask is not None)]

    def for_graphs(self, memory: StaticMemory | None = None) -> None:
        """Prepare the KV cache."""
        self.keys_values.for_graphs(memory)

    def prepare_drafts(self) -> None:
        """Compute, once per round, what the queries of drafts attend to."""
        self.keys_values.prepare_drafts()
        self._all_begun = min(self.lengths) >= self.num_modules

    def expect_tree(self, parents: Int[Tensor, "B C"], depth: int) -> None:
        """Announce that the next chunk is a tree."""
        self.keys_values.expect_tree(parents, depth)
        self.hidden.expect_tree(parents, depth)

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the chunk, or of the path in it, in row ``b``."""
        self.keys_values.commit(keep, path)
        self.hidden.commit(keep, path)
        self._changed()

    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only."""
        self.keys_values.select(rows)
        self.hidden.select(rows)
        self._changed()

    def _changed(self) -> None:
        self.lengths = self.keys_values.lengths
        self.path, self._all_begun = None, None

    def last(self, module: int, width: int) -> Float[Tensor, "B D"]:
        """Return a module's input in the slot after the last committed token.

        Args:
            module: Index of the module.
            width: Width ``D`` of a state.
        """
        return self.hidden.last[:, module * width : (module + 1) * width]

    def before_each(self, module: int, states: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """Return a module's input in each slot of a chunk: the previous token's state, or the parent's in a tree.

        Args:
            module: Index of the module.
            states: Output of the previous module, or of the trunk, for the chunk.
        """
        width = states.shape[2]
        last = torch.zeros_like(states[:, 0]) if self.hidden.empty else self.last(module, width)
        if self.keys_values.parents is None:
            return torch.cat((last[:, None], states[:, :-1]), dim=1)
        return at_positions(torch.cat((last[:, None], states), dim=1), self.keys_values.parents + 1)

    def append(
        self, module: int, keys: Float[Tensor, "B h C d"], values: Float[Tensor, "B h C d"], groups: int
    ) -> tuple[Float[Tensor, "B h S d"], Float[Tensor, "B h S d"], Shaped[Tensor, "#B 1 _ S"] | None]:
        """Write a module's keys and values of the chunk; return those that its queries attend to, and a folded mask.

        Args:
            module: Index of the module.
            keys: Keys of the chunk.
            values: Values of the chunk.
            groups: How many queries share a key-value head, folded one after the other.
        """
        keys, values = self.keys_values.append(module, keys, values)
        early = self._early[module]
        if early is not None:
            return keys, values, early.repeat(1, 1, groups, 1)
        first, mask = module + 1, self.keys_values.folded_mask(groups)
        return keys[:, :, first:], values[:, :, first:], None if mask is None else mask[..., first:]

    def positions_of_drafts(self, count: int, num_drafts: int) -> Int[Tensor, "B C"]:
        """Return the slots from the last emitted token on, repeated for each of several drafts.

        Args:
            count: Number of slots.
            num_drafts: Number ``N`` of drafts.
        """
        _, _, positions, _ = self.keys_values.last(0)
        return (positions + torch.arange(1, count + 1, device=positions.device)).repeat(1, num_drafts)

    def with_drafts(
        self, module: int, keys: Float[Tensor, "B h C d"], values: Float[Tensor, "B h C d"], num_drafts: int
    ) -> tuple[Float[Tensor, "B h S d"], Float[Tensor, "B h S d"], Bool[Tensor, "#B 1 C S"] | None]:
        """Return a module's committed keys and values followed by those of drafts, and a mask.

        Each draft sees the committed slots and its own.

        Args:
            module: Index of the module.
            keys: Keys of the slots from the last emitted token on, draft by draft.
            values: Values of the same slots.
            num_drafts: Number ``N`` of drafts.
        """
        if self._all_begun is None:
            self.prepare_drafts()
        kept_keys, kept_values, positions, kept_mask = self.keys_values.last(module)
        first = module + 1 if self._all_begun else 0
        kept_keys, kept_values = kept_keys[:, :, first:], kept_values[:, :, first:]
        every = torch.cat((kept_keys, keys), dim=2), torch.cat((kept_values, values), dim=2)
        count, device = keys.shape[2] // num_drafts, keys.device
        if self._all_begun and kept_mask is None and num_drafts == 1:  # the mask of a chain, in few calls
            seen = kept_keys.shape[2]
            if count == 1:
                return *every, None
            return *every, torch.ones(1, 1, count, seen + count, dtype=torch.bool, device=device).tril(seen)
        rows, own = (1 if kept_mask is None and self._all_begun else keys.shape[0]), torch.eye(count, device=device) > 0
        kept = torch.ones(rows, 1, kept_keys.shape[2], dtype=torch.bool, device=device)
        kept = kept if kept_mask is None else kept & kept_mask[:, 0, :, first:]
        drafted = torch.ones(count, count, dtype=torch.bool, device=device).tril().expand(rows, -1, -1)
        if not self._all_begun:
            kept = kept & (torch.arange(kept.shape[2], device=device) > module)
            begun = positions + torch.arange(1, count + 1, device=device) > module
            drafted = drafted & (begun[:, None] | own)
        apart = torch.eye(num_drafts, device=device) > 0
        drafted = (drafted[:, None, :, None] & apart[:, None, :, None]).flatten(3).flatten(1, 2)
        kept = kept.expand(-1, drafted.shape[1], -1)
        return *every, torch.cat((kept, drafted), dim=2)[:, None]
