"""Any causal language model of ``transformers`` as a trunk. ``transformers`` is imported when a trunk is made."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mtp_modules.core.checks import ascending_layers, at_least, content_only, refuse, within_positions
from mtp_modules.core.component import redescribe
from mtp_modules.core.fitting import check_trained_output
from mtp_modules.core.interfaces import DecodingState, Trunk, TrunkOutput
from mtp_modules.core.objective import OutputMatrix
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.layers.documents import positions_in_documents
from mtp_modules.trunks.huggingface_loading import causal_class, check_plain_config, load, plain_config
from mtp_modules.trunks.huggingface_parts import Loaded
from mtp_modules.trunks.recomputed import ReplayState, read_unpacked, recompute


class HuggingFaceTrunk(Trunk):
    """A causal language model of ``transformers`` without its output matrix; from a configuration, or trained.

    A pretrained one comes from a folder, from the Hugging Face hub, or from a GGUF file. Only safetensors and GGUF are
    read, and no code beside the weights is executed. :func:`~mtp_modules.core.describe` returns only the configuration
    of the trunk, so a saved model is rebuilt without access to the original weights.

    The hidden state is the input of the model's output matrix: that of the last layer after the final norm, times the
    factor on the logits where the model has one (Cohere, Granite). The output matrix itself, and its bias, become those
    of the unembedding: :class:`~mtp_modules.MTPModel` takes them (:meth:`take_trained_output`), and never loses them.

    **Decoding.** Architectures whose layers all have a KV cache, over all positions or a window, use preallocated cache
    slots; rejected tokens are masked, rows may differ in length, and drafts may be trees. All others (Mamba, hybrids,
    attention outside of the common interface of ``transformers``) are exact but slow: they recompute the whole text in
    every round. ``keeps_keys`` is true for the former.

    **Modes.** A pretrained trunk starts in evaluation mode, as a model of ``transformers`` does; one from ``config``
    starts in training mode, as any new module does. When a fit begins, Lightning leaves every module in its mode. So
    :class:`~mtp_modules.training.MTPModule` sets a trunk that it trains to training mode, and a frozen one back to
    evaluation mode. A training loop of your own calls ``model.train()``.

    **Packed documents** do not attend to each other. With a KV cache, positions restart and the mask ends at the
    document's start; otherwise, each document is read in a separate row.

    **A model in memory** shares its weights with the trunk, nothing is copied, and keeps its mode. Its attention
    becomes that of this package, which does the same.

    Args:
        model: A causal language model of ``transformers`` in memory, fine-tuned for instance.
        pretrained: A folder, or a name on the hub; ``None`` to initialise new weights by ``config``.
        config: ``model_type`` and sizes, by the names of ``transformers``; with ``pretrained``, changes to its own
            configuration.
        gguf_file: Name of a GGUF file in that folder.
        revision: Of a model on the hub: a branch, a tag or a commit.
        dtype: Precision of the weights, such as ``"bfloat16"``; torch's default if ``None``. Heads must have the same:
            ``heads.to(torch.bfloat16)``.
        feature_layers: Layers, counted from 0, whose outputs are returned too, for heads that read them. Not the last:
            its output, after the final norm, is the hidden state.
        max_positions: Longest sequence, if it is to be shorter than the model's own limit.

    Shape:
        tokens ``(B, T)`` -> hidden ``(B, T, D)``, and a feature ``(B, T, D)`` for each of ``feature_layers``.

    Raises:
        ValueError: If ``transformers`` is missing; the model does not exist, is not a causal language model, lacks
            weights, or has logits that are not a product with an output matrix; or an argument is out of range.

    Example:
        >>> import torch
        >>> config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
        >>> config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
        >>> HuggingFaceTrunk(config=config)(torch.zeros(1, 5, dtype=torch.long)).hidden.shape
        torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        pretrained: str | None = None,
        config: Mapping[str, Any] | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        feature_layers: Sequence[int] = (),
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        loaded: Loaded = load(
            self, model=model, pretrained=pretrained, config=config, gguf_file=gguf_file, revision=revision, dtype=dtype
        )
        trained = model is not None or pretrained is not None
        self.model: nn.Module = loaded.model
        self.config = loaded.config
        self.num_caches: int | None = loaded.num_caches
        self.output_scale = loaded.output_scale
        self.d_model, self.vocab_size = loaded.output.weight.shape[1], self.embedding.weight.shape[0]
        self.embedding_width = self.embedding.weight.shape[1]
        plain = loaded.output.weight is self.embedding.weight and loaded.output.bias is None
        self._output_is_embedding = trained and plain
        self._output: OutputMatrix | None = loaded.output if trained and not plain else None
        self._output_taken = False
        if loaded.output.weight.shape[0] != self.vocab_size:
            rows = f"{loaded.output.weight.shape[0]} rows, its embedding {self.vocab_size}"
            refuse(self, f"the output matrix of {loaded.config.model_type} has {rows}; such models are not supported.")
        self.max_positions = _positions(loaded.config)
        if max_positions is not None:
            at_least(self, "max_positions", max_positions, 1)
            if self.max_positions is not None and max_positions > self.max_positions:
                refuse(self, f"max_positions must be at most {self.max_positions} for this model, got {max_positions}.")
            self.max_positions = max_positions
        self.feature_layers = ascending_layers(self, feature_layers, len(self.blocks) - 1)
        self.train(self.model.training if model is not None else not trained)
        described = dict.fromkeys(("model", "pretrained", "gguf_file", "revision", "dtype"))
        redescribe(self, **described, config=plain_config(loaded.config))
        self._suit_precision()

    @classmethod
    def check_stored(cls, arguments: Mapping[str, Any]) -> None:
        """Raise an error for a trunk that is not described by the configuration of its architecture alone."""
        content_only(cls.__name__, arguments, "the configuration of a trunk")
        check_plain_config(cls.__name__, arguments.get("config"))

    @property
    def embedding(self) -> nn.Embedding:  # type: ignore[override]  # owned by the model, not a second child
        """The model's own embedding; where the module scales its output, heads read it scaled."""
        found: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return found

    @property
    def output_layer(self) -> OutputMatrix | None:
        """The trained output matrix and bias, until :meth:`take_trained_output`; ``None`` if there is none."""
        return OutputMatrix(self.embedding.weight) if self._output_is_embedding else self._output

    @property
    def keeps_keys(self) -> bool:
        """Whether decoding uses a KV cache, instead of recomputing the text in every round."""
        return self.num_caches is not None

    @property
    def supports_trees(self) -> bool:  # type: ignore[override]  # it depends on the architecture
        """Whether a chunk may be a tree of drafts: with a KV cache."""
        return self.keeps_keys

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder layers."""
        count = self.config.num_hidden_layers
        lists = (module for module in self.model.modules() if isinstance(module, nn.ModuleList))
        return next((tuple(each) for each in lists if len(each) == count), ())

    def take_trained_output(self, *, tied: bool, bias: bool) -> OutputMatrix | None:
        """Return the output matrix of a pretrained model; see :class:`~mtp_modules.core.interfaces.Trunk`.

        A tied one can be taken by any number of models, any other by one.
        """
        if self._output_taken:
            refuse(self, "its output matrix is in another model already; make a trunk for each model.")
        like, found = self.embedding.weight, self.output_layer
        if found is None:
            return None
        check_trained_output(self, found, tied=tied, bias=bias)
        self._output, self._output_taken = None, not self._output_is_embedding
        # The trunk may have been moved or converted since it was made.
        return OutputMatrix(found.weight.to(like), None if found.bias is None else found.bias.to(like))

    def __getstate__(self) -> dict[str, Any]:
        """Return a state in which the output matrix is not taken; a copy has none if this trunk's was taken."""
        return {**super().__getstate__(), "_output_taken": False}

    def reset_parameters(self) -> None:
        """Initialise the weights as ``transformers`` does for this model."""
        self.model.apply(self.model._init_weights)  # type: ignore[arg-type]

    def foreign_state(self) -> dict[str, Tensor]:
        """Return the weights under the names of ``transformers`` in the whole model, without the output matrix."""
        return {f"{self.model.base_model_prefix}.{name}": tensor for name, tensor in self.model.state_dict().items()}

    def foreign_config(self) -> dict[str, Any]:
        """Return the content of ``config.json`` of the whole model, in the precision of the weights."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        return plain_config(self.config) | {"architectures": [causal_class(self.config)], "dtype": dtype}

    def _apply(self, fn: Any, recurse: bool = True) -> "HuggingFaceTrunk":
        """Convert the weights, but not the precision of buffers, such as rotary frequencies."""
        before = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            owner, _, own_name = name.rpartition(".")
            module = self.model.get_submodule(owner)
            now = getattr(module, own_name)
            if now.dtype != buffer.dtype:
                setattr(module, own_name, buffer.to(now.device))
        self._suit_precision()
        return self

    def _suit_precision(self) -> None:
        """Multiply experts one by one in float64, which torch's grouped products do not support."""
        if self.embedding.weight.dtype == torch.float64:
            self.model.set_experts_implementation("eager")  # type: ignore[operator]

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        state: DecodingState | None = None,
    ) -> TrunkOutput:
        """Read tokens; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        if state is not None:
            return self._extend(tokens, document_ids, state)
        within_positions(self, tokens.shape[1], self.max_positions, "trunk")
        if document_ids is None:
            return self._read(tokens)
        if not self.keeps_keys:
            return read_unpacked(self._read, tokens, document_ids)
        from mtp_modules.trunks.huggingface_cache import PackedRows, reading

        with reading(PackedRows(document_ids)):  # not all models of transformers separate documents by positions
            return self._read(tokens, position_ids=positions_in_documents(document_ids))

    def _extend(self, tokens: Int[Tensor, "B T"], document_ids: Tensor | None, state: DecodingState) -> TrunkOutput:
        if document_ids is not None:
            refuse(self, "document_ids cannot be combined with a state; decode one document per row.")
        if isinstance(state, ReplayState) and not self.keeps_keys:
            return recompute(self._read, tokens, state)
        from mtp_modules.trunks.huggingface_cache import HuggingFaceState, reading

        if not (isinstance(state, HuggingFaceState) and self.keeps_keys):
            refuse(self, f"state must come from this trunk's new_state, got {type(state).__name__}.")
        state.begin(tokens.shape[1])
        positions = state.positions.expand(len(tokens), -1)
        with reading(state):
            return self._read(tokens, position_ids=positions, past_key_values=state.cache)

    def _read(self, tokens: Int[Tensor, "B T"], **how: Any) -> TrunkOutput:
        found = self.model(
            input_ids=tokens, use_cache="past_key_values" in how, output_hidden_states=bool(self.feature_layers), **how
        )
        hidden: Float[Tensor, "B T D"] = found.last_hidden_state
        features = tuple(found.hidden_states[layer + 1] for layer in self.feature_layers)
        return TrunkOutput(hidden if self.output_scale == 1.0 else hidden * self.output_scale, features)

    def new_state(self, batch_size: int, capacity: int) -> DecodingState:
        """Make an empty state; see :class:`~mtp_modules.core.interfaces.Trunk`."""
        weight = self.embedding.weight
        if self.num_caches is None:
            return ReplayState(batch_size, capacity, weight.device, max_positions=self.max_positions)
        from mtp_modules.trunks.huggingface_cache import HuggingFaceState

        return HuggingFaceState(
            batch_size, capacity, num_caches=self.num_caches, like=weight, max_positions=self.max_positions
        )

    def flops(self, length: int) -> int:
        """Return the operations of the layers: matrices, the active experts of a token, and attention."""
        total = sum(_multiplied(block, self.config) for block in self.blocks) * 2 * length
        if heads := getattr(self.config, "num_attention_heads", None):
            width = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
            window = getattr(self.config, "sliding_window", None) or length
            usual = "full_attention" if window == length else "sliding_attention"
            kinds = getattr(self.config, "layer_types", None) or [usual] * len(self.blocks)
            seen = {"full_attention": length, "sliding_attention": min(length, window)}
            total += sum(4 * length * seen.get(kind, 0) * heads * width for kind in kinds)
        return total


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _multiplied(block: nn.Module, config: Any) -> int:
    """Return the number of active weights of a layer per token."""
    experts = next((count for name in _EXPERTS if (count := getattr(config, name, None))), None)
    total = 0
    for name, weight in block.named_parameters():
        if experts is not None and weight.ndim == 3 and weight.shape[0] == experts:
            total += weight.numel() * config.num_experts_per_tok // experts
        elif weight.ndim >= 2 and name.endswith("weight"):
            total += weight.numel()
    return total


def _positions(config: Any) -> int | None:
    """Return the longest sequence whose position encoding does not depend on its length."""
    found: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):
        if kind.get("rope_type") in ("dynamic", "longrope"):  # beyond this length the rotation changes
            original = kind.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            found = min(found or original, original) if original else found
    return found
