"""The complete model: trunk, heads and unembedding. It is usable without Lightning."""

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtp_modules.core.checks import TokenIds, plain_ids, refuse, tokens_in_vocabulary
from mtp_modules.core.component import Component, build, build_within, check_describable, describe, redescribe
from mtp_modules.core.fitting import check_draft_tokens, check_fit, checked_output, dtype_of, heads_for
from mtp_modules.core.interfaces import Heads, MixtureStates, Tokenizer, Trunk, TrunkOutput
from mtp_modules.core.objective import OutputMatrix
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import num_positions, tokens_between
from mtp_modules.core.unembedding import Unembedding
from mtp_modules.pretrained import CONFIG, FORMAT, FORMAT_KEY, check_format, load_pretrained, read_model, write_model

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MTPModel(Component, nn.Module):
    """A language model that predicts several tokens at once. Plain PyTorch.

    Args:
        trunk: Turns tokens into hidden states.
        heads: Turn a hidden state into one state per horizon.
        tie_embeddings: Share the trunk's embedding matrix with horizon 1's output.
        own_unembeddings: Give every horizon beyond the first its own output matrix, instead of sharing horizon 1's. Cai
            et al. 2024 (arXiv 2401.10774), section 2.1.
        output_bias: Add a bias to the logits; one for each output matrix.
        num_draft_tokens: Size of the draft vocabulary of horizons beyond the first. A small one makes drafts cheap
            where the whole vocabulary is large; :meth:`trim_drafts` sets the tokens.

    Shape:
        tokens ``(B, T + max(horizons))`` -> one state per horizon: ``(B, T, D)``, and ``(B, P, D)`` beyond the first.

    Raises:
        ValueError: If the widths or the precisions of trunk and heads differ, the embedding cannot be tied, the trunk
            does not return the inner layers that the heads read or would lose a part of its trained output layer, or
            ``num_draft_tokens`` lies outside the vocabulary.

    Example:
        >>> from mtp_modules import LinearHeads, RecurrentTrunk
        >>> model = MTPModel(
        ...     trunk=RecurrentTrunk(vocab_size=50, d_model=16), heads=LinearHeads(d_model=16, num_horizons=3)
        ... )
        >>> [state.shape for state in model(torch.zeros(2, 10, dtype=torch.long))]
        [torch.Size([2, 7, 16]), torch.Size([2, 7, 16]), torch.Size([2, 7, 16])]
    """

    def __init__(
        self,
        *,
        trunk: Trunk,
        heads: Heads,
        tie_embeddings: bool = True,
        own_unembeddings: bool = False,
        output_bias: bool = False,
        num_draft_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads
        if num_draft_tokens is not None:
            check_draft_tokens(num_draft_tokens, trunk, heads)
        check_fit(trunk, heads)
        tied_to = None
        if tie_embeddings:
            if not isinstance(trunk.embedding, nn.Embedding) or trunk.embedding_width != trunk.d_model:
                refuse(
                    self,
                    f"tie_embeddings needs an embedding as wide as the trunk ({trunk.d_model}), "
                    f"got {trunk.embedding_width}; set tie_embeddings to false.",
                )
            tied_to = trunk.embedding
        trained = trunk.take_trained_output(tied=tie_embeddings, bias=output_bias)
        if trained is not None and tied_to is None and trained.weight is trunk.embedding.weight:
            trained = OutputMatrix(trained.weight.detach().clone(), trained.bias)
        self.unembedding = Unembedding(
            trunk.d_model,
            trunk.vocab_size,
            tied_to=tied_to,
            bias=output_bias,
            num_own=len(heads.horizons) - 1 if own_unembeddings else 0,
            num_draft_tokens=num_draft_tokens,
            trained=trained,
            transition_rank=heads.transition_rank,
        ).to(dtype_of(trunk))

    @property
    def horizons(self) -> tuple[int, ...]:
        """Offsets of the heads."""
        return self.heads.horizons

    @property
    def lookahead(self) -> int:
        """How many tokens a training batch carries beyond the positions that the trunk reads."""
        return max(self.heads.horizons)

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        *,
        document_ids: Int[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        detach: Collection[str] = (),
        known: TrunkOutput | None = None,
    ) -> tuple[Float[Tensor, "B _ D"], ...] | MixtureStates:
        """Return one state per horizon for a training batch, or the mixture of heads with a joint distribution.

        A trunk without a trainable parameter runs without gradients.

        Args:
            tokens: Token ids, ``L = T + max(horizons)``; the trunk reads the first ``T``.
            document_ids: Which document every token belongs to.
            positions: Positions at which horizons beyond the first are computed; all if ``None``.
            detach: Parts that get no gradient from horizons beyond the first: ``"trunk"``, ``"embedding"``.
            known: What :meth:`read` has returned for these tokens, or a frozen trunk's cached states.

        Raises:
            ValueError: If ``known`` has other positions, widths or layers.
        """
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            tokens_in_vocabulary(self, tokens, self.trunk.vocab_size)
        length = num_positions(tokens, self.horizons)
        read = None if document_ids is None else document_ids[:, :length]
        if known is None:
            output = self.read(tokens, document_ids=document_ids)
        else:
            output = checked_output(known, self.trunk, self.heads, (len(tokens), length), self.unembedding.weight.dtype)
        hidden, given = output.hidden, self.heads.features_of(output)
        if given and "trunk" in detach:
            given["features"] = tuple(feature.detach() for feature in output.features)
        future, wanted = None, None if self.heads.reads_every_token else positions
        if self.heads.reads_future:
            future = self.trunk.embedding(tokens_between(tokens, self.horizons, wanted))
            future = future.detach() if "embedding" in detach else future
        if self.heads.reads_token_ids:
            given["future_tokens"] = tokens_between(tokens, self.horizons, positions)
        states: tuple[Tensor, ...] = self.heads(
            hidden,
            far_hidden=hidden.detach() if "trunk" in detach else None,
            future=future,
            positions=positions,
            document_ids=read,
            **given,
        )
        return states

    def read(self, tokens: Int[Tensor, "B L"], *, document_ids: Int[Tensor, "B L"] | None = None) -> TrunkOutput:
        """Return the trunk's states for a training batch; without gradients if the trunk has nothing to train.

        Args:
            tokens: Token ids, ``L = T + max(horizons)``; the trunk reads the first ``T``.
            document_ids: Which document every token belongs to.
        """
        length = num_positions(tokens, self.horizons)
        trains = any(parameter.requires_grad for parameter in self.trunk.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            output: TrunkOutput = self.trunk(
                tokens[:, :length], document_ids=None if document_ids is None else document_ids[:, :length]
            )
        return output

    def trim_drafts(self, tokens: TokenIds) -> None:
        """Let horizons beyond the first score these tokens only, such as the most frequent ones of a corpus.

        A draft then costs ``len(tokens)`` rows of an output matrix, not the whole vocabulary. Lossless decoding gives
        the same output: other tokens are never drafted, and come from horizon 1. The rows are copies, which training
        may change. Zhao et al. 2025 (FR-Spec, arXiv 2502.14856).

        Args:
            tokens: Different token ids: a list, a range, a tensor or an array.

        Raises:
            ValueError: If there are none, one is duplicate or lies outside the vocabulary, the model drafts nothing, or
                it is sharded over several processes.

        Example:
            >>> from mtp_modules import LinearHeads, RecurrentTrunk
            >>> model = MTPModel(
            ...     trunk=RecurrentTrunk(vocab_size=50, d_model=16), heads=LinearHeads(d_model=16, num_horizons=3)
            ... )
            >>> model.trim_drafts(range(10))
            >>> model.unembedding.logits(torch.zeros(16), 1).isfinite().sum()
            tensor(10)
        """
        ids = plain_ids(self.unembedding, tokens)
        check_draft_tokens(len(ids), self.trunk, self.heads)
        self.unembedding.trim(ids)
        redescribe(self, num_draft_tokens=len(ids))

    def save_pretrained(self, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``, both or neither, with a checksum of every tensor.

        Args:
            folder: Created if it does not exist.
            tokenizer: Written into the configuration, so that decoding needs no other file.

        Raises:
            ValueError: If they cannot be written, or a part was made with an argument that no file can describe, such
                as a module.
        """
        check_describable(self, self)
        tokens = None if tokenizer is None else describe(tokenizer)
        write_model(Path(folder), {FORMAT_KEY: FORMAT, "model": describe(self), "tokenizer": tokens}, self)

    def push_to_hub(
        self, repo_id: str, *, tokenizer: Tokenizer | None = None, private: bool = True, api: Any = None
    ) -> str:
        """Upload the files of :meth:`save_pretrained` to a model repository of the Hugging Face hub.

        Args:
            repo_id: ``"owner/name"``; created if it does not exist.
            tokenizer: Written into the configuration.
            private: Whether a new repository is private.
            api: A ``huggingface_hub.HfApi``, for another hub or with a token; one with the stored token if ``None``.

        Returns:
            URL of the upload.

        Raises:
            ValueError: If ``huggingface_hub`` is not installed, or the name is not ``"owner/name"``.
        """
        if repo_id.count("/") != 1 or not all(repo_id.split("/")):
            refuse(self, f"repo_id must be 'owner/name', got {repo_id!r}.")
        if api is None:
            try:
                from huggingface_hub import HfApi  # an extra, and takes half a second
            except ImportError:
                refuse(self, "push_to_hub needs huggingface_hub; install it with: pip install 'mtp_modules[hub]'.")
            api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer=tokenizer)
            api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
            uploaded = api.upload_folder(
                repo_id=repo_id, repo_type="model", folder_path=folder, commit_message="Upload a model of mtp_modules"
            )
        return str(uploaded)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, trusted: tuple[str, ...] = ("mtp_modules",)
    ) -> tuple["MTPModel", Tokenizer | None]:
        """Load a model that :meth:`save_pretrained` wrote.

        Args:
            folder: With ``config.json`` and ``model.safetensors``.
            trusted: Top-level packages whose classes may be built.

        Returns:
            The model, in evaluation mode and the precision it was saved in, and its tokenizer if one was saved.

        Raises:
            ValueError: If a file is missing, is invalid, or does not fit.
        """
        folder = Path(folder)
        config, shapes, dtypes, checksums = read_model(cls.__name__, folder)
        check_format(cls.__name__, config[FORMAT_KEY], folder)
        for name in ("model", "tokenizer"):
            if not isinstance(found := config.get(name), dict) and (name == "model" or found is not None):
                refuse(cls.__name__, f"{folder / CONFIG} does not describe the {name}; save the model again.")
        model: MTPModel = build_within(shapes, cls.__name__, config["model"], trusted=trusted, role=MTPModel)
        stored = dtypes & _DTYPES.keys()
        model.to(_DTYPES[stored.pop()] if len(stored) == 1 else torch.get_default_dtype())
        load_pretrained(cls.__name__, model, folder, checksums)
        tokenizer = build(found, trusted=trusted, role=Tokenizer) if (found := config.get("tokenizer")) else None
        return model.eval(), tokenizer

    @classmethod
    def from_hugging_face(
        cls,
        model: str | Path | nn.Module,
        *,
        heads: Heads | Callable[..., Heads],
        num_horizons: int | None = None,
        own_unembeddings: bool = False,
        num_draft_tokens: int | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        config: Mapping[str, Any] | None = None,
        feature_layers: Sequence[int] = (),
        max_positions: int | None = None,
    ) -> "MTPModel":
        """Give heads to a model of ``transformers``, whose output matrix and bias stay what they are.

        Args:
            model: A name on the hub, a folder, or a model in memory.
            heads: Or what makes them from ``d_model``. Linear, parallel and chained ones change the next token too.
            num_horizons: Passed to ``heads``, if given.
            own_unembeddings: See the class.
            num_draft_tokens: See the class.
            revision: See :class:`~mtp_modules.HuggingFaceTrunk`, as for the following.
            dtype: Precision of the weights, those of the heads that are made too.
            config: Changes to the configuration.
            feature_layers: Inner layers for heads that read them.
            max_positions: Longest sequence.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If the trunk or the heads cannot be made, or do not fit.
        """
        from mtp_modules.trunks import HuggingFaceTrunk  # transformers takes seconds, and is an extra

        trunk = HuggingFaceTrunk(
            model if isinstance(model, nn.Module) else None,
            pretrained=None if isinstance(model, nn.Module) else str(model),
            config=config,
            revision=revision,
            dtype=dtype,
            feature_layers=feature_layers,
            max_positions=max_positions,
        )
        made, output = heads_for(cls.__name__, trunk, heads, num_horizons), trunk.output_layer
        return cls(
            trunk=trunk,
            heads=made,
            tie_embeddings=output is not None and output.weight is trunk.embedding.weight,
            own_unembeddings=own_unembeddings,
            output_bias=output is not None and output.bias is not None,
            num_draft_tokens=num_draft_tokens,
        ).eval()
