"""Medusa heads in vLLM's names: ``blocks.{i}.layers.{j}`` and ``lm_heads.{i}``."""

from collections.abc import Mapping
from typing import Any

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Tensor
from mtp_modules.heads import ResidualHeads
from mtp_modules.interop.conventions import Conventions
from mtp_modules.interop.format import Format, Wanted, attach_heads
from mtp_modules.interop.medusa import CONVENTIONS, TAKES, output_matrices, residual_heads
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import field
from mtp_modules.model import MTPModel


class MedusaVLLM(Format):
    """ResidualHeads and their output matrices, under the names of vLLM's Medusa.

    Heads that share the output matrix of horizon 1 are written with ``original_lm_head``, which stores it once.
    """

    name = "medusa_vllm"
    keeps_trunk = False
    takes = TAKES
    method = "medusa"

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        residual_heads(self.name, model)
        return CONVENTIONS

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the blocks and the output matrices."""
        heads = residual_heads(self.name, model)
        written: dict[str, Tensor] = {}
        for index, stack in enumerate(heads.stacks):
            for layer in range(heads.num_layers):
                block = stack.get_submodule(f"{layer}.linear")
                for name, value in block.state_dict().items():
                    written[f"blocks.{index}.layers.{layer}.{name}"] = value
        own = len(model.unembedding.own_weights) > 0
        for index, matrix in enumerate(output_matrices(model, len(heads.stacks) if own else 1)):
            written[f"lm_heads.{index}.weight"] = matrix
        return written, {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "num_heads": len(heads.stacks),
            "num_hidden_layers": heads.num_layers,
            "hidden_size": heads.d_model,
            "vocab_size": model.trunk.vocab_size,
            "truncated_vocab_size": model.trunk.vocab_size,
            "medusa_fc_bias": True,
            "original_lm_head": not own,
            "dtype": str(model.unembedding.weight.dtype).removeprefix("torch."),
        }

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        width, vocab = field(self.name, config, "hidden_size"), field(self.name, config, "vocab_size")
        count, layers = field(self.name, config, "num_heads"), field(self.name, config, "num_hidden_layers")
        if field(self.name, config, "truncated_vocab_size", vocab) != vocab or "token_map" in tensors:
            refuse(self.name, "the heads predict a part of the vocabulary (token_map), and ours predict all of it.")
        if field(self.name, config, "logit_scale", 1.0) != 1.0:
            refuse(self.name, f"logit_scale is {config['logit_scale']}, and our logits are not scaled.")
        base = wanted.trunk
        if base is not None and base.trunk.vocab_size != vocab:
            refuse(self.name, f"vocab_size is {vocab} here and {base.trunk.vocab_size} in the model given as trunk.")
        biases = field(self.name, config, "medusa_fc_bias", False)
        state: dict[str, Tensor] = {}
        for head in range(count):
            for layer in range(layers):
                name, ours = f"blocks.{head}.layers.{layer}", f"heads.stacks.{head}.{layer}.linear"
                state[f"{ours}.weight"] = tensors.take(f"{name}.weight", width, width)
                bias = tensors.take(f"{name}.bias", width) if biases else torch.zeros_like(state[f"{ours}.weight"][0])
                state[f"{ours}.bias"] = bias
        shared = field(self.name, config, "original_lm_head", False)
        matrices = [tensors.take(f"lm_heads.{head}.weight", vocab, width) for head in range(1 if shared else count)]
        if not shared:
            state |= {f"unembedding.own_weights.{head}": matrix for head, matrix in enumerate(matrices)}
        elif base is not None and not torch.equal(matrices[0], base.unembedding.weight):
            refuse(
                self.name,
                "lm_heads.0.weight must equal the output matrix of the model given as trunk (original_lm_head), but "
                "its values differ; give the model that the heads belong to.",
            )
        heads = ResidualHeads(d_model=width, num_horizons=count + 1, num_layers=layers)
        return attach_heads(self.name, base, heads, state, own=not shared)
