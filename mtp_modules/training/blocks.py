"""Activation checkpointing and compilation of a model's blocks before training, on one device or many."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mtp_modules.core.checks import refuse
from mtp_modules.model import MTPModel

MODES = ("full", "selective")
"""``full`` keeps only a block's input; ``selective`` also keeps what is expensive to compute again."""


def prepare_blocks(model: MTPModel, *, activation_checkpointing: str | None = None, compiled: bool = False) -> None:
    """Set up activation checkpointing and compilation for the blocks of trunk and heads.

    Args:
        model: Changed in place.
        activation_checkpointing: ``"full"`` or ``"selective"``; see :func:`checkpoint_blocks`.
        compiled: Whether to compile them; see :func:`compile_blocks`.

    Raises:
        ValueError: If the mode is unknown, or an option is given and the model has no blocks.
    """
    blocks = (*model.trunk.blocks, *model.heads.blocks)
    for option, asked in (("activation_checkpointing", activation_checkpointing), ("compile_blocks", compiled)):
        if asked and not blocks:
            parts = f"{type(model.trunk).__name__} and {type(model.heads).__name__}"
            refuse(option, f"must be left out for {parts}, which have no blocks; TransformerTrunk has.")
    if activation_checkpointing is not None:
        checkpoint_blocks(blocks, activation_checkpointing)
    if compiled:
        compile_blocks(blocks)


def _expensive_operations() -> list[Any]:
    """Return the operations whose results are kept: matrix products and attention, in the forms of every device."""
    aten = torch.ops.aten
    names = (
        *("mm", "addmm", "bmm", "baddbmm"),
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    communication = (torch.ops._c10d_functional.all_reduce, torch.ops._c10d_functional.reduce_scatter_tensor)
    return [*(getattr(aten, name).default for name in names), *(operation.default for operation in communication)]


def checkpoint_blocks(blocks: Sequence[nn.Module], mode: str) -> None:
    """Drop the activations inside each block after its forward pass, and recompute them in the backward pass.

    ``"full"`` keeps only the input of a block, which costs one more forward pass of the blocks (Chen et al. 2016,
    arXiv 1604.06174). ``"selective"`` also keeps the results of matrix products and of attention, so that only norms,
    activations and rotations are recomputed. Parameter names do not change.

    Args:
        blocks: Changed in place.
        mode: ``"full"`` or ``"selective"``.

    Raises:
        ValueError: If the mode is unknown.
    """
    if mode not in MODES:
        refuse("activation_checkpointing", f"must be one of {', '.join(MODES)}, got {mode!r}.")
    contexts = {}
    if mode == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _expensive_operations())
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, contexts)


def _recomputed(forward: Callable[..., Any], contexts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)


def compile_blocks(blocks: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """Compile each block as one graph, for training and evaluation; decoding does not use it.

    Blocks have the same code, so the first is compiled and the others reuse it.

    Args:
        blocks: Changed in place.
        backend: Of ``torch.compile``.
    """
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
