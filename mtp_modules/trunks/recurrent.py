"""The recurrent trunk: an RNN, GRU or LSTM."""

from collections.abc import Sequence

import torch
from torch import nn

from mtp_modules.core.checks import ascending_layers, at_least, refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Trunk, TrunkOutput
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.layers.chunks import ChunkedState
from mtp_modules.layers.documents import unpack_documents

_CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class RecurrentState(ChunkedState):
    """The recurrent state of every layer after each token of the last chunk, and after the last committed token.

    Args:
        batch_size: Number ``B`` of rows.
        capacity: Maximum tokens per row, the chunk included.
        memory: The initial recurrent state of each layer: a tensor ``(B, D)``, or two for an LSTM.
        max_positions: Maximum tokens that a row can keep; ``None`` for no limit.
    """

    def __init__(
        self, batch_size: int, capacity: int, memory: list[tuple[Tensor, ...]], *, max_positions: int | None = None
    ) -> None:
        super().__init__(batch_size, capacity, max_positions=max_positions)
        self.memory = memory
        self.pending: list[tuple[Tensor, ...]] = []

    def commit(self, keep: list[int], path: Int[Tensor, "B P"] | None = None) -> None:
        """Keep the first ``keep[b]`` tokens of the chunk in row ``b``."""
        super().commit(keep, path)
        device = self.memory[0][0].device
        index = torch.tensor(keep, device=device)
        rows = torch.arange(len(keep), device=device)
        self.memory = [
            tuple(
                torch.where((index == 0)[:, None], before, after[rows, (index - 1).clamp(min=0)])
                for before, after in zip(memory, pending, strict=True)
            )
            for memory, pending in zip(self.memory, self.pending, strict=True)
        ]
        self.pending = []

    def select(self, rows: list[int]) -> None:
        """Keep some of the rows only."""
        super().select(rows)
        self.memory = [tuple(part[rows] for part in memory) for memory in self.memory]


class RecurrentTrunk(Trunk):
    """An embedding followed by torch's RNN, GRU or LSTM layers.

    Args:
        vocab_size: Number ``V`` of token ids.
        d_model: Width ``D`` of the hidden states.
        cell: ``"rnn"`` (tanh), ``"gru"`` or ``"lstm"``.
        num_layers: Number of layers.
        embedding_width: Width of the embedding; ``d_model`` if ``None``, which tied embeddings require.
        max_positions: Maximum sequence length, or ``None`` for no limit.
        feature_layers: Layers, counted from 0, whose outputs are also returned, for heads that read them.

    Shape:
        tokens ``(B, T)`` -> hidden ``(B, T, D)``.

    Raises:
        ValueError: If a size is below 1, the cell is unknown or a feature layer does not exist.

    Example:
        >>> trunk = RecurrentTrunk(vocab_size=50, d_model=64, embedding_width=32, cell="rnn")
        >>> trunk(torch.zeros(1, 5, dtype=torch.long)).hidden.shape
        torch.Size([1, 5, 64])
    """

    embedding: nn.Embedding

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        cell: str = "gru",
        num_layers: int = 1,
        embedding_width: int | None = None,
        max_positions: int | None = None,
        feature_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        for name, value in (
            ("vocab_size", vocab_size),
            ("d_model", d_model),
            ("num_layers", num_layers),
            ("embedding_width", embedding_width),
            ("max_positions", max_positions),
        ):
            if value is not None:
                at_least(self, name, value, 1)
        if cell not in _CELLS:
            refuse(self, f"cell must be one of {', '.join(_CELLS)}, got {cell!r}.")
        self.vocab_size, self.d_model, self.max_positions, self.cell = vocab_size, d_model, max_positions, cell
        self.feature_layers = ascending_layers(self, feature_layers, num_layers)
        self.embedding_width = width = embedding_width or d_model
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(
            _CELLS[cell](width if index == 0 else d_model, d_model, batch_first=True) for index in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the embedding with variance 1/width; layers reset themselves."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        state: DecodingState | None = None,
    ) -> TrunkOutput:
        """Compute the hidden states of tokens; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        if state is not None:
            return self._output(self._extend(tokens, document_ids, state))
        within_positions(self, tokens.shape[1], self.max_positions, "trunk")
        if document_ids is not None:
            return self._output(self._by_document(tokens, document_ids))
        return self._output(self._layer_by_layer(tokens))

    def _output(self, outputs: list[Float[Tensor, "B T D"]]) -> TrunkOutput:
        """Return the last layer's output, and those of the feature layers."""
        return TrunkOutput(outputs[-1], tuple(outputs[index] for index in self.feature_layers))

    def _layer_by_layer(self, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T D"]]:
        x, outputs = self.embedding(tokens), []
        for layer in self.layers:
            x, _ = layer(x)
            outputs.append(x)
        return outputs

    def _by_document(
        self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B T D"]]:
        """Unpack the documents to one row each, run the layers, and pack the outputs again."""
        unpacked = unpack_documents(tokens, document_ids)
        return [output[unpacked.row, unpacked.column] for output in self._layer_by_layer(unpacked.tokens)]

    def _extend(
        self, tokens: Int[Tensor, "B T"], document_ids: Tensor | None, state: DecodingState
    ) -> list[Float[Tensor, "B T D"]]:
        if document_ids is not None:
            refuse(self, "document_ids cannot be combined with a state; decode one document per row.")
        if not isinstance(state, RecurrentState):
            refuse(self, f"state must come from this trunk's new_state, got {type(state).__name__}.")
        state.begin(tokens.shape[1])
        x = self.embedding(tokens)
        state.pending = []
        for layer, memory in zip(self.layers, state.memory, strict=True):
            if self.cell == "lstm":
                x, cells = _lstm_states(layer, x, memory)
                state.pending.append((x, cells))
            else:
                x, _ = layer(x, memory[0][None].contiguous())
                state.pending.append((x,))
        return [pending[0] for pending in state.pending]

    def new_state(self, batch_size: int, capacity: int) -> RecurrentState:
        """Make an empty state; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        parts = 2 if self.cell == "lstm" else 1
        zeros = self.embedding.weight.new_zeros(batch_size, self.d_model)
        return RecurrentState(
            batch_size, capacity, [(zeros,) * parts for _ in self.layers], max_positions=self.max_positions
        )

    def flops(self, length: int) -> int:
        """Return the operations of the layers: at every step, each matrix times its input or the previous state."""
        matrices = (weight for layer in self.layers for weight in layer.parameters() if weight.ndim == 2)
        return 2 * length * sum(matrix.numel() for matrix in matrices)


def _lstm_states(
    layer: nn.Module, x: Float[Tensor, "B T E"], memory: tuple[Tensor, ...]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """Run step by step, because torch returns an LSTM's cell state only after the last step."""
    hidden, cell = memory[0][None].contiguous(), memory[1][None].contiguous()
    outputs, cells = [], []
    for step in x.unbind(dim=1):
        output, (hidden, cell) = layer(step[:, None], (hidden, cell))
        outputs.append(output)
        cells.append(cell[0])
    return torch.cat(outputs, dim=1), torch.stack(cells, dim=1)
