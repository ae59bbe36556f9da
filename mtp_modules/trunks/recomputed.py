"""Trunks without a cache: they recompute the whole text for every chunk. Exact for any causal module."""

from abc import abstractmethod
from collections.abc import Callable

import torch

from mtp_modules.core.checks import refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Trunk, TrunkOutput
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.layers.chunks import ChunkedState
from mtp_modules.layers.documents import unpack_documents


class ReplayState(ChunkedState):
    """The tokens of every row and nothing else, so a rejected token is simply dropped.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Maximum tokens per row, the chunk included.
        device: Device of the tokens.
        max_positions: Maximum tokens that a row can keep; ``None`` for no limit.
    """

    def __init__(
        self, batch_size: int, capacity: int, device: torch.device, *, max_positions: int | None = None
    ) -> None:
        super().__init__(batch_size, capacity, max_positions=max_positions)
        self.tokens = torch.zeros(batch_size, capacity, dtype=torch.long, device=device)

    def append(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """Write a chunk after each row's tokens, and return its slots.

        Args:
            tokens: The chunk.
        """
        self.begin(tokens.shape[1])
        starts = torch.tensor(self.lengths, device=tokens.device)
        slots = starts[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens[torch.arange(len(slots), device=tokens.device)[:, None], slots] = tokens
        return slots

    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only."""
        super().select(rows)
        self.tokens = self.tokens[rows]


def recompute(read: Callable[[Tensor], TrunkOutput], tokens: Int[Tensor, "B T"], state: ReplayState) -> TrunkOutput:
    """Run a module over the tokens of a state and a chunk after them, and return the output for the chunk.

    Rows have unequal lengths. The module is causal, so tokens after the end of a row do not affect the row.

    Args:
        read: A causal module: token ids to hidden states, without a state.
        tokens: The chunk.
        state: State of the tokens before the chunk.
    """
    slots = state.append(tokens)
    end = max(state.lengths) + tokens.shape[1]
    if state.max_positions is not None and end > state.max_positions:  # tokens beyond are never committed
        end, slots = state.max_positions, slots.clamp(max=state.max_positions - 1)
    output = read(state.tokens[:, :end])
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    return TrunkOutput(output.hidden[rows, slots], tuple(feature[rows, slots] for feature in output.features))


def read_unpacked(
    read: Callable[[Tensor], TrunkOutput], tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]
) -> TrunkOutput:
    """Run a module over every document of a packed batch in a row of its own, and pack the results again.

    Args:
        read: A causal module: token ids to hidden states, without a state.
        tokens: The packed batch.
        document_ids: The document of every token.
    """
    unpacked = unpack_documents(tokens, document_ids)
    output = read(unpacked.tokens)
    return TrunkOutput(
        output.hidden[unpacked.row, unpacked.column],
        tuple(feature[unpacked.row, unpacked.column] for feature in output.features),
    )


class RecomputedTrunk(Trunk):
    """Base of trunks that wrap any causal module; subclasses implement :meth:`hidden_states` only.

    Decoding recomputes the whole text in every round, so the cost of a round grows with the length of the text;
    speculation still saves rounds. Packed documents are unpacked to one row per document. A module with a cache
    implements :class:`~mtp_modules.core.interfaces.Trunk` directly.

    The constructor sets ``d_model``, ``vocab_size``, ``max_positions``, ``embedding`` and ``embedding_width``.
    """

    @abstractmethod
    def hidden_states(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Return the hidden states of rows that hold one document each. Position ``t`` must not see later tokens.

        Args:
            tokens: Token ids.
        """

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        state: DecodingState | None = None,
    ) -> TrunkOutput:
        """Compute the hidden states of tokens; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        if state is not None:
            if document_ids is not None:
                refuse(self, "document_ids cannot be combined with a state; decode one document per row.")
            if not isinstance(state, ReplayState):
                refuse(self, f"state must come from this trunk's new_state, got {type(state).__name__}.")
            return recompute(self._read, tokens, state)
        within_positions(self, tokens.shape[1], self.max_positions, "trunk")
        return self._read(tokens) if document_ids is None else read_unpacked(self._read, tokens, document_ids)

    def _read(self, tokens: Int[Tensor, "B T"]) -> TrunkOutput:
        return TrunkOutput(self.hidden_states(tokens))

    def new_state(self, batch_size: int, capacity: int) -> ReplayState:
        """Make an empty state; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        device = next(self.parameters()).device
        return ReplayState(batch_size, capacity, device, max_positions=self.max_positions)

    def flops(self, length: int) -> int:
        """Return two operations per matrix entry and token, the cost of layers that apply each matrix once per token.

        Attention, convolutions and experts cost something else; a trunk with such layers overrides this method.
        """
        embeddings = {id(parameter) for parameter in self.embedding.parameters()}
        matrices = (each for each in self.parameters() if each.ndim == 2 and id(each) not in embeddings)
        return 2 * length * sum(matrix.numel() for matrix in matrices)
