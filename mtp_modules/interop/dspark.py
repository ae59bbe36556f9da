"""DSpark: DFlash's block with a Markov head and a confidence head, under the names of its released checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Heads
from mtp_modules.core.shapes import Tensor
from mtp_modules.heads import ConfidenceHeads, ContextBlockHeads, TransitionHeads
from mtp_modules.interop.conventions import Conventions, Takes
from mtp_modules.interop.dflash import (
    TAKES,
    block_conventions,
    block_heads,
    read_block,
    refuse_mask_file,
    stated_conventions,
    write_block,
)
from mtp_modules.interop.drafters import flat, refuse_entries
from mtp_modules.interop.format import Format, Wanted, attach_heads, needed_base
from mtp_modules.interop.tensors import Tensors
from mtp_modules.interop.trunks import field
from mtp_modules.model import MTPModel

_OURS = {"markov_head_type": "vanilla"}


class DSpark(Format):
    """TransitionHeads around ContextBlockHeads as a drafter of DSpark, with or without ConfidenceHeads.

    ConfidenceHeads around TransitionHeads read the state and the factors of the token before; inside them, the state
    alone. The drafter is otherwise that of :class:`DFlash`. DSpark 2026 (arXiv 2607.05147).
    """

    name = "dspark"
    keeps_trunk = False
    draft_vocabulary = True
    method = "dspark"
    vllm_notes = (
        "vLLM 0.32 drafts with DSpark in its second model runner only, which its build for CPUs cannot run: serve on a "
        "GPU, where this was not tried.",
    )
    takes: ClassVar[Takes] = {**TAKES, "anchor": ("given", "predicts")}

    def conventions(self, model: MTPModel) -> Conventions:
        """Return the conventions of a model's heads."""
        return block_conventions(self._parts(model)[0])

    def stated(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return what the configuration says of the anchor and of attention in a block."""
        return stated_conventions(flat(config, sample_from_anchor=False), from_anchor=True)

    def _parts(self, model: MTPModel) -> tuple[ContextBlockHeads, TransitionHeads, ConfidenceHeads | None]:
        """Return the heads, innermost first."""
        confidence, outer = None, model.heads
        if isinstance(outer, ConfidenceHeads):
            confidence, outer = outer, outer.heads
        if not isinstance(outer, TransitionHeads):
            refuse(
                self.name,
                f"the format stores TransitionHeads around ContextBlockHeads, the model has {type(outer).__name__}; "
                "see docs/interop.md.",
            )
        inner = outer.heads
        if isinstance(inner, ConfidenceHeads) and confidence is None:
            confidence, inner = inner, inner.heads
        block = block_heads(self.name, model, inner)
        if outer.previous is None:
            refuse(
                self.name,
                "the Markov head of this format has a low rank, and rank is None, the whole matrix; train with a rank.",
            )
        return block, outer, confidence

    def heads(self, model: MTPModel, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the block drafter, and both heads."""
        block, transition, confidence = self._parts(model)
        written, entries = write_block(self.name, model, block)
        assert transition.previous is not None
        assert model.unembedding.transition is not None
        before, more = transition.previous.weight, entries["vocab_size"] - model.trunk.vocab_size
        written["markov_head.markov_w1.weight"] = torch.cat((before, before.new_zeros(more, before.shape[1])))
        written["markov_head.markov_w2.weight"] = model.unembedding.transition
        if confidence is not None:
            assert confidence.to_confidence is not None
            written["confidence_head.proj.weight"] = confidence.to_confidence.weight
            written["confidence_head.proj.bias"] = confidence.to_confidence.bias
        return written, entries | {
            "architectures": ["Qwen3DSparkModel"],
            "mask_token_id": entries["dflash_config"]["mask_token_id"],
            "target_layer_ids": entries["dflash_config"]["target_layer_ids"],
            "sample_from_anchor": block.sample_from_anchor,
            "dspark_bonus_anchor": not block.sample_from_anchor,
            "markov_head_type": "vanilla",
            "markov_rank": transition.rank,
            "enable_confidence_head": confidence is not None,
            "confidence_head_with_markov": confidence is model.heads,
        }

    def read(self, tensors: Tensors, config: Mapping[str, Any], wanted: Wanted) -> MTPModel:
        """Build a model from a checkpoint; see :class:`~mtp_modules.interop.format.Format`."""
        base, config = needed_base(self.name, wanted.trunk), flat(config)
        refuse_entries(self.name, config, _OURS)
        found = read_block(tensors, config, wanted, base)
        vocab, width, rank = base.trunk.vocab_size, base.trunk.d_model, field(self.name, config, "markov_rank")
        before = tensors.take("markov_head.markov_w1.weight", found.vocab_size, rank)[:vocab]
        after = tensors.take("markov_head.markov_w2.weight", found.num_draft_tokens or vocab, rank)
        with_markov = bool(config.get("confidence_head_with_markov", False))
        confident: dict[str, Tensor] = {}
        if config.get("enable_confidence_head", False):
            count = width + rank if with_markov else width
            confident["to_confidence.weight"] = tensors.take("confidence_head.proj.weight", 1, count)
            confident["to_confidence.bias"] = tensors.take("confidence_head.proj.bias", 1)
        heads: Heads = found.heads
        state: Mapping[str, Tensor] = found.state
        if confident and not with_markov:
            heads, state = ConfidenceHeads(heads=heads), _around(state, confident)
        heads = TransitionHeads(heads=heads, vocab_size=vocab, rank=rank)
        state = _around(state, {"previous.weight": before})
        if confident and with_markov:
            heads, state = ConfidenceHeads(heads=heads), _around(state, confident)
        return attach_heads(
            self.name,
            base,
            heads,
            _around(state, found.outputs | {"unembedding.transition": after}),
            num_draft_tokens=found.num_draft_tokens,
            feature_layers=found.layers,
        )

    def open(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the files."""
        refuse_mask_file(self.name, folder)
        return super().open(folder)


def _around(inner: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module whose part ``heads`` has others."""
    return {f"heads.{name}": value for name, value in inner.items()} | dict(own)
