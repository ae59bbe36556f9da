"""The interface of a foreign format."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from mtp_modules.core.checks import ascending_layers, refuse
from mtp_modules.core.component import redescribe
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.shapes import Tensor
from mtp_modules.interop import files
from mtp_modules.interop.base import no_base
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.serving import Exported, command_of, notes_of
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import NamedTrunk
from mtp_modules.model import MTPModel


class Wanted(NamedTuple):
    """What an import is given in addition to the tensors and the configuration.

    Attributes:
        conventions: Conventions of the heads.
        num_horizons: Number of horizons; ``None`` to derive it from the configuration.
        trunk: A model that supplies the trunk and horizon 1; ``None`` to read the trunk from the files.
        max_positions: Longest sequence, where the configuration does not specify it.
    """

    conventions: Conventions
    num_horizons: int | None = None
    trunk: MTPModel | None = None
    max_positions: int | None = None


class Format(ABC):
    """The tensor names and shapes that another program reads.

    Attributes:
        name: Name of the format on the command line.
        takes: Values of each convention that its readers accept.
        keeps_trunk: Whether the format stores the trunk together with the heads.
        model_types: Values of ``model_type`` in an existing configuration to which heads can be added.
        draft_vocabulary: Whether the format can store heads that predict a part of the vocabulary.
        method: vLLM's name for the kind of heads; ``None`` if vLLM does not serve the format.
        unserved: Why vLLM does not serve it, a sentence.
        vllm_chain: Which state vLLM passes from one module to the next; ``None`` without modules.
        vllm_state: Which state of the trunk vLLM gives to the heads.
        vllm_masks_first: Whether vLLM replaces the embedding at position 0 by zero.
        vllm_notes: What else vLLM does otherwise, a sentence each.
    """

    name: ClassVar[str]
    takes: ClassVar[Takes]
    keeps_trunk: ClassVar[bool]
    model_types: ClassVar[tuple[str, ...]] = ()
    draft_vocabulary: ClassVar[bool] = False
    method: ClassVar[str | None] = None
    unserved: ClassVar[str] = "No engine serves this format."
    vllm_chain: ClassVar[str | None] = None
    vllm_state: ClassVar[str] = "after_norm"
    vllm_masks_first: ClassVar[bool] = False
    vllm_notes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads.

        Args:
            model: The model to export.

        Raises:
            ValueError: If the format cannot store the model's heads.
        """

    def trunk(self, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and configuration of the trunk; both are empty if the format does not store it.

        Args:
            model: The model to export.
        """
        return {}, {}

    @abstractmethod
    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of the heads and their entries in the configuration.

        Args:
            model: The model to export.
            config: Configuration of the trunk.

        Raises:
            ValueError: If the format cannot represent the heads.
        """

    @abstractmethod
    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from the tensors of a checkpoint.

        Args:
            tensors: Tensors of the checkpoint; every one must be taken.
            config: Configuration of the checkpoint.
            wanted: Conventions, trunk and sizes that the checkpoint does not contain.

        Raises:
            ValueError: If our classes cannot represent the checkpoint.
        """

    def stated(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return the conventions that a configuration states.

        Args:
            config: Configuration of the checkpoint.
        """
        return {}

    def with_base(self, config: dict[str, Any], place: Path, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of heads, naming the model that they belong to.

        Args:
            config: Configuration of the heads.
            place: Folder of the model without heads.
            base: Its configuration.
        """
        return config

    def serving(self, model: MTPModel, folder: Path, *, has_tokenizer: bool) -> Exported:
        """Return how vLLM serves an export, and what it does otherwise than this package.

        Args:
            model: The model that was written.
            folder: Where it lies.
            has_tokenizer: Whether the folder has a tokenizer.
        """
        if self.method is None:
            return Exported(None, (self.unserved,))
        if not self.keeps_trunk and (reason := no_base(model)) is not None:
            return Exported(None, (f"Heads alone were written, and no engine serves their trunk: {reason}.",))
        notes = notes_of(
            self.method, model, chain=self.vllm_chain, state=self.vllm_state, masks_first=self.vllm_masks_first
        )
        notes += self.vllm_notes
        if not has_tokenizer:
            notes += ("Without a tokenizer of bytes or of Hugging Face, vLLM takes and returns token ids only.",)
        command = command_of(self.method, model, folder, alone=not self.keeps_trunk, has_tokenizer=has_tokenizer)
        return Exported(command, notes)

    def store(self, folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Write the files.

        Args:
            folder: An empty folder.
            tensors: All tensors, by name.
            config: The whole configuration.
        """
        files.write_tensors(folder / files.WEIGHTS, tensors)
        files.write_json(folder / files.CONFIG, config)

    def open(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the files.

        Args:
            folder: Folder of the checkpoint.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        config = files.read_json(self.name, folder / files.CONFIG)
        return files.read_tensors(self.name, folder), config


def fill(trunk: Trunk, heads: Heads, state: Mapping[str, Tensor], **options: Any) -> MTPModel:
    """Build a model from a trunk, heads and a state dict.

    Args:
        trunk: The new trunk.
        heads: The new heads.
        state: The model's state dict.
        options: Further arguments of :class:`~mtp_modules.MTPModel`.
    """
    dtype = next(iter(state.values())).dtype
    model = MTPModel(trunk=trunk.to(dtype), heads=heads.to(dtype), **options)
    model.load_state_dict(dict(state))
    return model.eval()


def needed_base(owner: str, base: MTPModel | None) -> MTPModel:
    """Return the model that supplies the trunk, after checking that the caller has given it.

    Args:
        owner: Name of the format.
        base: The caller's argument.

    Raises:
        ValueError: If it is ``None``.
    """
    if base is None:
        refuse(owner, "the format stores heads only; give trunk, a checkpoint of the model that they belong to.")
    return base


def attach_heads(
    owner: str,
    base: MTPModel | None,
    heads: Heads,
    state: Mapping[str, Tensor],
    own: bool = False,
    *,
    num_draft_tokens: int | None = None,
    feature_layers: Sequence[int] | None = None,
) -> MTPModel:
    """Attach heads to the trunk and horizon 1 of another model.

    Args:
        owner: Name of the format.
        base: The other model; it is not modified.
        heads: The new heads.
        state: Tensors of the heads and of their own output matrices, under the names of the new model.
        own: Whether every horizon has its own output matrix.
        num_draft_tokens: How many tokens the horizons beyond the first predict; all if ``None``.
        feature_layers: Layers of the trunk, counted from 0, that the heads read; ``None`` if they read none.

    Raises:
        ValueError: If ``base`` is ``None``, its width differs, its heads transform the hidden state for horizon 1, or
            its trunk cannot return the layers.
    """
    base = needed_base(owner, base)
    width = base.trunk.d_model
    if heads.d_model != width:
        refuse(owner, f"the heads have d_model={heads.d_model}, the trunk {width}; give the model that they belong to.")
    probe = torch.zeros(1, 1, width, dtype=base.unembedding.weight.dtype)
    if base.heads.first(probe) is not probe:
        refuse(
            owner,
            f"{type(base.heads).__name__} of the model given as trunk have their own module for horizon 1, which "
            "these heads would drop; give a model whose horizon 1 reads the trunk's hidden state directly.",
        )
    if base.unembedding.bias is not None:
        refuse(owner, "the model given as trunk has an output bias, which the format does not support.")
    tied = base.unembedding.tied
    heads.to(base.unembedding.weight.dtype)
    trunk = copy.deepcopy(base.trunk)
    if feature_layers is not None:
        _return_features(owner, trunk, feature_layers)
    model = MTPModel(
        trunk=trunk, heads=heads, tie_embeddings=tied, own_unembeddings=own, num_draft_tokens=num_draft_tokens
    )
    kept = {
        name: value
        for name, value in base.state_dict().items()
        if name.startswith("trunk.") or name == "unembedding.weight"
    }
    model.load_state_dict(kept | dict(state))
    return model.eval()


def _return_features(owner: str, trunk: Trunk, layers: Sequence[int]) -> None:
    """Let a trunk return the states after some layers; a trunk of transformers has none after the last."""
    if tuple(layers) == tuple(trunk.feature_layers):
        return
    if "feature_layers" not in inspect.signature(type(trunk)).parameters:
        refuse(
            owner,
            f"the heads read the layers {list(layers)} of the trunk, and a {type(trunk).__name__} returns "
            f"{list(trunk.feature_layers)}; give a model whose trunk returns them.",
        )
    count = len(trunk.blocks) - isinstance(trunk, NamedTrunk)
    trunk.feature_layers = ascending_layers(owner, layers, count)
    redescribe(trunk, feature_layers=list(layers))
