"""The transformer trunk."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from mtp_modules.core.checks import ascending_layers, at_least, finite, refuse, within_positions
from mtp_modules.core.interfaces import DecodingState, Trunk, TrunkOutput
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import same_document_keys, tokens_before
from mtp_modules.layers.cache import KeyValueState
from mtp_modules.layers.transformer import RMSNorm, RotaryPositions, TransformerLayer


class TransformerTrunk(Trunk):
    """A decoder-only transformer without its output matrix: pre-norm, RoPE, grouped-query attention, SwiGLU.

    Args:
        vocab_size: Number ``V`` of token ids.
        d_model: Width ``D``.
        num_layers: Number of layers.
        num_heads: Query heads per layer.
        num_kv_heads: Key-value heads; ``num_heads`` if ``None``. Few key-value heads make verification cheap.
        ffn_width: Inner width of the feed-forward layers; 8/3 of ``d_model``, rounded up to a multiple of 64, if
            ``None``.
        max_positions: Maximum sequence length.
        final_norm: Normalise the hidden states that the heads read. False for heads with layers and a norm of their
            own, as in Gloeckle et al. 2024.
        rope_base: Base of the rotary positions.
        num_previous: How many previous tokens are embedded along with each token, with separate tables. One or more
            save a small model the layers that would look them up; 0 is the usual transformer.
        embedding_std: Initial standard deviation of the embedding. Small for a tied embedding, about 1 otherwise.
        qk_norm: Normalise every query and key before its rotation, as Qwen3 does.
        norm_eps: Added to the mean square in every norm.
        head_dim: Width of one head; ``d_model / num_heads`` if ``None``.
        feature_layers: Layers, counted from 0, whose outputs are also returned, for heads that read them.

    Shape:
        tokens ``(B, T)`` -> hidden ``(B, T, D)``.

    Raises:
        ValueError: If a size is below 1 or does not divide, a feature layer does not exist, or a sequence is longer
            than ``max_positions``.

    Example:
        >>> import torch
        >>> trunk = TransformerTrunk(vocab_size=256, d_model=32, num_layers=2, num_heads=4, max_positions=64)
        >>> trunk(torch.zeros(1, 5, dtype=torch.long)).hidden.shape
        torch.Size([1, 5, 32])
    """

    embedding: nn.Embedding
    max_positions: int
    supports_trees = True

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        max_positions: int = 2048,
        final_norm: bool = True,
        rope_base: float = 10000.0,
        num_previous: int = 0,
        embedding_std: float = 0.02,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        head_dim: int | None = None,
        feature_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        for name, value in (
            ("vocab_size", vocab_size),
            ("d_model", d_model),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
            ("max_positions", max_positions),
        ):
            at_least(self, name, value, 1)
        self.vocab_size, self.d_model, self.max_positions = vocab_size, d_model, max_positions
        at_least(self, "num_previous", num_previous, 0)
        finite(self, "embedding_std", embedding_std, 0)
        self.feature_layers = ascending_layers(self, feature_layers, num_layers)
        self.embedding_width, self.num_previous, self.embedding_std = d_model, num_previous, embedding_std
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.previous = nn.Embedding(num_previous * (vocab_size + 1), d_model) if num_previous else None
        if head_dim is not None:
            at_least(self, "head_dim", head_dim, 1)
        self.rotary = RotaryPositions(head_dim or d_model // num_heads, max_positions, base=rope_base)
        layers = (
            TransformerLayer(
                d_model,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                ffn_width=ffn_width,
                depth=num_layers,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                head_dim=head_dim,
            )
            for _ in range(num_layers)
        )
        self.layers = cast("Sequence[TransformerLayer]", nn.ModuleList(layers))
        self.norm = RMSNorm(d_model, eps=norm_eps) if final_norm else nn.Identity()
        self.reset_parameters()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers."""
        return tuple(self.layers)

    def reset_parameters(self) -> None:
        """Initialise the embeddings; layers reset themselves."""
        nn.init.normal_(self.embedding.weight, std=self.embedding_std)
        if self.previous is not None:
            nn.init.normal_(self.previous.weight, std=self.embedding_std / 2)

    def _embed(self, tokens: Int[Tensor, "B T"], before: Int[Tensor, "B T C"] | None) -> Float[Tensor, "B T D"]:
        """Embed tokens and the previous tokens; row ``V`` of each table stands for no previous token."""
        x: Tensor = self.embedding(tokens)
        if self.previous is not None and before is not None:
            tables = torch.arange(self.num_previous, device=tokens.device) * (self.vocab_size + 1)
            x = x + self.previous(before + tables).sum(dim=2)
        return x

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        state: DecodingState | None = None,
    ) -> TrunkOutput:
        """Compute the hidden states of tokens; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        if state is not None:
            return self._extend(tokens, document_ids, state)
        length = tokens.shape[1]
        within_positions(self, length, self.max_positions, "trunk")
        mask = None if document_ids is None else same_document_keys(document_ids)[:, None]
        before = None
        if self.previous is not None:
            before = tokens_before(tokens, self.num_previous, self.vocab_size, document_ids)
        x = self._embed(tokens, before)
        table = self.rotary(None, length, x)
        outputs = []
        for layer in self.layers:
            x = layer(x, table, mask)
            outputs.append(x)
        return self._output(outputs)

    def _output(self, outputs: list[Float[Tensor, "B T D"]]) -> TrunkOutput:
        """Return the last layer's output after the norm, and those of the feature layers."""
        return TrunkOutput(self.norm(outputs[-1]), tuple(outputs[index] for index in self.feature_layers))

    def _extend(self, tokens: Int[Tensor, "B T"], document_ids: Tensor | None, state: DecodingState) -> TrunkOutput:
        if document_ids is not None:
            refuse(self, "document_ids cannot be combined with a state; decode one document per row.")
        if not isinstance(state, KeyValueState):
            refuse(self, f"state must come from this trunk's new_state, got {type(state).__name__}.")
        state.begin(tokens.shape[1])
        return self.read(tokens, state)

    def read(self, tokens: Int[Tensor, "B T"], state: DecodingState) -> TrunkOutput:
        """Append the announced chunk."""
        assert isinstance(state, KeyValueState)
        x = self._embed(tokens, None if self.previous is None else state.previous_tokens(tokens))
        table = self.rotary(state.positions, tokens.shape[1], x)
        outputs = []
        for index, layer in enumerate(self.layers):
            x = layer.extend(x, table, state, index)
            outputs.append(x)
        return self._output(outputs)

    def new_state(self, batch_size: int, capacity: int) -> KeyValueState:
        """Make an empty state; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        attention = self.layers[0].attention
        return KeyValueState(
            batch_size,
            capacity,
            num_layers=len(self.layers),
            num_kv_heads=attention.local_kv_heads,
            head_dim=attention.head_dim,
            like=self.embedding.weight,
            max_positions=self.max_positions,
            num_previous=self.num_previous,
            padding=self.vocab_size,
        )

    def flops(self, length: int) -> int:
        """Return the operations of the layers; looking up embeddings costs none."""
        return sum(layer.flops(length, length) for layer in self.layers)
