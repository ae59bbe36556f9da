"""What a foreign format is."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Heads, Trunk
from mtp_modules.core.shapes import Tensor
from mtp_modules.interop import files
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.tensors import Tensors
from mtp_modules.model import MTPModel


class Wanted(NamedTuple):
    """What the caller of an import says, beside the files.

    Attributes:
        conventions: How the heads are meant.
        num_horizons: Horizons, where the files do not say; ``None`` to leave it to them.
        trunk: A model whose trunk and horizon 1 the heads are put on; ``None`` to read the files' own.
        max_positions: Longest sequence, where the files do not say.
    """

    conventions: Conventions
    num_horizons: int | None = None
    trunk: MTPModel | None = None
    max_positions: int | None = None


class Format(ABC):
    """Names and shapes of tensors that another program reads.

    Attributes:
        name: As the command line says it.
        takes: The conventions of its readers.
        keeps_trunk: Whether the trunk is kept along with the heads, among whose tensors they live.
        model_types: Which ``model_type`` of an existing configuration heads may be added to.
    """

    name: ClassVar[str]
    takes: ClassVar[Takes]
    keeps_trunk: ClassVar[bool]
    model_types: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def conventions(self, model: MTPModel) -> Conventions:
        """Return how the heads of a model are meant.

        Args:
            model: To be exported.

        Raises:
            ValueError: If the format has no names for its heads.
        """

    def trunk(self, model: MTPModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and configuration of the trunk; nothing if the format does not keep it.

        Args:
            model: To be exported.
        """
        return {}, {}

    @abstractmethod
    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors of the heads, and what the configuration says of them.

        Args:
            model: To be exported.
            config: Of the trunk.

        Raises:
            ValueError: If the format cannot say what they are.
        """

    @abstractmethod
    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Make a model of the tensors of a checkpoint.

        Args:
            tensors: Every one must be taken.
            config: Its configuration.
            wanted: What else is known.

        Raises:
            ValueError: If it is not what our classes can be.
        """

    def store(self, folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Write the files.

        Args:
            folder: Empty.
            tensors: All.
            config: The whole configuration.
        """
        files.write_tensors(folder / files.WEIGHTS, tensors)
        files.write_json(folder / files.CONFIG, config)

    def open(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the files.

        Args:
            folder: That holds them.

        Raises:
            ValueError: If one is missing or damaged.
        """
        config = files.read_json(self.name, folder / files.CONFIG)
        return files.read_tensors(self.name, folder), config


def fill(trunk: Trunk, heads: Heads, state: Mapping[str, Tensor], **options: Any) -> MTPModel:
    """Put trunk, heads and their numbers together.

    Args:
        trunk: New.
        heads: New.
        state: Every tensor of the model, by its names.
        options: Of the model.
    """
    dtype = next(iter(state.values())).dtype
    model = MTPModel(trunk=trunk.to(dtype), heads=heads.to(dtype), **options)
    model.load_state_dict(dict(state))
    return model.eval()


def put_on(owner: str, base: MTPModel | None, heads: Heads, state: Mapping[str, Tensor], own: bool = False) -> MTPModel:
    """Put heads on the trunk and horizon 1 of another model.

    Args:
        owner: Name of the format.
        base: The other model; not changed.
        heads: New.
        state: The tensors of the heads, and of output matrices of their own, by the names of the new model.
        own: Whether every horizon has an output matrix of its own.

    Raises:
        ValueError: If there is no other model, its width differs, or its heads change the trunk's state for horizon 1.
    """
    if base is None:
        refuse(owner, "the format keeps heads alone; give trunk, a checkpoint of the model that they belong to.")
    width = base.trunk.d_model
    if heads.d_model != width:
        refuse(owner, f"the heads have d_model={heads.d_model}, the trunk {width}; give the model that they belong to.")
    probe = torch.zeros(1, 1, width, dtype=base.unembedding.weight.dtype)
    if base.heads.first(probe) is not probe:
        refuse(
            owner,
            f"{type(base.heads).__name__} of the model given as trunk have a module of their own for horizon 1, which "
            "these heads would drop; give a model whose horizon 1 is the trunk's state.",
        )
    if base.unembedding.bias is not None:
        refuse(owner, "the model given as trunk has a bias behind its output matrix, which heads of others do not.")
    tied = base.unembedding.tied
    heads.to(base.unembedding.weight.dtype)
    model = MTPModel(trunk=copy.deepcopy(base.trunk), heads=heads, tie_embeddings=tied, own_unembeddings=own)
    kept = {
        name: value
        for name, value in base.state_dict().items()
        if name.startswith("trunk.") or name == "unembedding.weight"
    }
    model.load_state_dict(kept | dict(state))
    return model.eval()
