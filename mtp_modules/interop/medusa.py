"""Medusa's original files: ``medusa_lm_head.safetensors`` and a small configuration."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.heads import ResidualHeads
from mtp_modules.interop import files
from mtp_modules.interop.conventions import Conventions
from mtp_modules.interop.format import Format, Wanted, attach_heads, needed_base
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import field
from mtp_modules.model import MTPModel

WEIGHTS = "medusa_lm_head.safetensors"
TAKES = {"concatenation": ("none",), "trunk_state": ("after_norm",), "chain_state": ("none",), "position_0": ("none",)}
CONVENTIONS = Conventions(concatenation="none", trunk_state="after_norm", chain_state="none", position_0="none")
_PREFIX = "medusa_head."


def residual_heads(owner: str, model: MTPModel) -> ResidualHeads:
    """Return the heads if they are Medusa's.

    Args:
        owner: Name of the format.
        model: The model that owns the heads.

    Raises:
        ValueError: If the heads are of another class, or have a part that the format cannot store.
    """
    heads = model.heads
    if not isinstance(heads, ResidualHeads):
        refuse(owner, f"the format stores ResidualHeads, the model has {type(heads).__name__}; see docs/interop.md.")
    if not len(heads.stacks):
        refuse(owner, "the heads have no horizon beyond the first, so there is nothing to write.")
    if hasattr(model.trunk, "norm") and not hasattr(model.trunk.norm, "weight"):
        refuse(owner, "heads of this format read the hidden states after the final norm; build with final_norm=True.")
    return heads


def output_matrices(model: MTPModel, count: int) -> list[Tensor]:
    """Return the output matrix of each horizon beyond the first.

    Args:
        model: The model; its horizons may share the output matrix of horizon 1.
        count: Number of horizons beyond the first.
    """
    return [model.unembedding.matrix(index + 1).weight for index in range(count)]


class Medusa(Format):
    """ResidualHeads and their output matrices, under the names of FasterDecoding's Medusa.

    The original code repeats one block if ``medusa_num_layers`` is above 1, so only heads of one block are written.
    vLLM 0.32 reads these names too, and biases if ``medusa_fc_bias`` is set.
    """

    name = "medusa"
    keeps_trunk = False
    takes = TAKES
    method = "medusa"

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        residual_heads(self.name, model)
        return CONVENTIONS

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the blocks and the output matrix of each horizon."""
        heads = residual_heads(self.name, model)
        if heads.num_layers > 1:
            refuse(
                self.name,
                f"the original code repeats one block, and num_layers is {heads.num_layers}; "
                "train with num_layers=1, or use medusa_vllm.",
            )
        written = {f"{i}.{name}": value for i, s in enumerate(heads.stacks) for name, value in s.state_dict().items()}
        for index, matrix in enumerate(output_matrices(model, len(heads.stacks))):
            written[f"{index}.{heads.num_layers}.weight"] = matrix
        counts = {"medusa_num_heads": len(heads.stacks), "medusa_num_layers": heads.num_layers}
        sizes = {"hidden_size": heads.d_model, "vocab_size": model.trunk.vocab_size}
        of_vllm = {"model_type": "medusa", "architectures": ["MedusaModel"], "medusa_fc_bias": True}
        dtype = str(model.unembedding.weight.dtype).removeprefix("torch.")
        return written, counts | sizes | of_vllm | {"base_model_name_or_path": None, "dtype": dtype}

    def with_base(self, config: dict[str, Any], place: Path, base: Mapping[str, Any]) -> dict[str, Any]:
        """Name the model where Medusa's own code looks for it."""
        return config | {"base_model_name_or_path": str(place)}

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        count, layers = field(self.name, config, "medusa_num_heads"), field(self.name, config, "medusa_num_layers")
        prefix = _PREFIX if f"{_PREFIX}0.0.linear.weight" in tensors else ""
        base = needed_base(self.name, wanted.trunk)
        width, vocab = base.trunk.d_model, base.trunk.vocab_size
        state = {}
        for head in range(count):
            for layer in range(layers):
                name = f"{prefix}{head}.{layer}.linear"
                ours = f"heads.stacks.{head}.{layer}.linear"
                state[f"{ours}.weight"] = tensors.take(f"{name}.weight", width, width)
                state[f"{ours}.bias"] = tensors.take(f"{name}.bias", width)
            matrix = tensors.take(f"{prefix}{head}.{layers}.weight", vocab, width)
            state[f"unembedding.own_weights.{head}"] = matrix
        extra = [name for name in tensors.names() if re.match(rf"{re.escape(prefix)}{count}\.", name)]
        if extra:
            refuse(self.name, f"medusa_num_heads is {count}, but the file has {extra[0]}; correct config.json.")
        heads = ResidualHeads(d_model=width, num_horizons=count + 1, num_layers=layers)
        return attach_heads(self.name, base, heads, state, own=True)

    def store(self, folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Write the files."""
        files.write_tensors(folder / WEIGHTS, tensors)
        files.write_json(folder / files.CONFIG, config)

    def open(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the files."""
        config = files.read_json(self.name, folder / files.CONFIG)
        return files.read_tensors(self.name, folder, WEIGHTS), config
