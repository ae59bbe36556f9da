"""Trunks without a memory of their own: they read the whole text again for every chunk. Exact for anything causal."""

from abc import abstractmethod
from collections.abc import Callable

import torch

from mtp_modules.core.checks import refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Trunk, TrunkOutput
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.layers.chunks import ChunkedState
from mtp_modules.layers.documents import unpack_documents


class ReplayState(ChunkedState):
    """The tokens of every row and nothing else. To take a token back is to forget it.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Most tokens a row can hold, the chunk included.
        device: Where the tokens live.
        max_positions: Most tokens that a row can keep; ``None`` for no limit.
    """

    def __init__(
        self, batch_size: int, capacity: int, device: torch.device, *, max_positions: int | None = None
    ) -> None:
        super().__init__(batch_size, capacity, max_positions=max_positions)
        self.tokens = torch.zeros(batch_size, capacity, dtype=torch.long, device=device)

    def append(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """Write a chunk behind what each row holds, and return the slots where it stands.

        Args:
            tokens: The chunk.
        """
        self.begin(tokens.shape[1])
        starts = torch.tensor(self.lengths, device=tokens.device)
        slots = starts[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens[torch.arange(len(slots), device=tokens.device)[:, None], slots] = tokens
        return slots

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows only."""
        super().select(rows)
        self.tokens = self.tokens[rows]


def recompute(read: Callable[[Tensor], TrunkOutput], tokens: Int[Tensor, "B T"], state: ReplayState) -> TrunkOutput:
    """Read all that a state holds and a chunk behind it, and return what is said of the chunk.

    Rows are of unequal lengths; what stands behind the end of a row is not looked at by what comes before.

    Args:
        read: A causal module: token ids to hidden states, without a state.
        tokens: The chunk.
        state: Of the tokens before.
    """
    slots = state.append(tokens)
    end = max(state.lengths) + tokens.shape[1]
    if state.max_positions is not None and end > state.max_positions:  # what lies beyond is never kept
        end, slots = state.max_positions, slots.clamp(max=state.max_positions - 1)
    whole = read(state.tokens[:, :end])
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    return TrunkOutput(whole.hidden[rows, slots], tuple(feature[rows, slots] for feature in whole.features))


def read_unpacked(
    read: Callable[[Tensor], TrunkOutput], tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]
) -> TrunkOutput:
    """Read every document of a packed batch in a row of its own, and put the results back.

    Args:
        read: A causal module: token ids to hidden states, without a state.
        tokens: The batch.
        document_ids: Which document every token belongs to.
    """
    apart = unpack_documents(tokens, document_ids)
    found = read(apart.tokens)
    return TrunkOutput(
        found.hidden[apart.row, apart.column],
        tuple(feature[apart.row, apart.column] for feature in found.features),
    )


class RecomputedTrunk(Trunk):
    """Base of trunks that wrap any causal module: :meth:`hidden_states` is all that it must say.

    Decoding reads the whole text again in every round, so a round costs as much as the text is long; speculation still
    saves rounds. Packed documents are read in rows of their own. A module that can do better implements
    :class:`~mtp_modules.core.interfaces.Trunk` itself.

    The constructor sets ``d_model``, ``vocab_size``, ``max_positions``, ``embedding`` and ``embedding_width``.
    """

    @abstractmethod
    def hidden_states(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Read rows of one document each, from their beginnings. Position ``t`` must not see what comes after it.

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
        """Read tokens; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        if state is not None:
            if document_ids is not None:
                refuse(self, "document_ids do not go with a state; decode one document a row.")
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
        """Return two for each parameter of a matrix and each token: what layers that multiply once a token take.

        Attention, convolutions and experts cost something else; a trunk that has them says so itself.
        """
        looked_up = {id(parameter) for parameter in self.embedding.parameters()}
        matrices = (each for each in self.parameters() if each.ndim == 2 and id(each) not in looked_up)
        return 2 * length * sum(matrix.numel() for matrix in matrices)
