"""Attention over latents, as DeepSeek-V3 has it, with our numbers in it.

There a matrix compresses the layer's input, a norm follows, and a second matrix makes of it a value for every query
head and those channels of its key that are not rotated; all rotated channels belong to one key that all heads share.
With one key-value head that is ours: all channels of the key are rotated, and the latent is the layer's input itself.
It has passed a norm with a gain already. The first matrix takes that gain away, the norm in between finds nothing more
to normalise and gives the gain back. Every matrix of ours is kept as it is.
"""

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.interop.tensors import Tensors


def alternate(rows: Float[Tensor, "R D"], head_dim: int) -> Float[Tensor, "R D"]:
    """Return rows with the channels that are rotated together next to each other, not half a head apart.

    Args:
        rows: Of queries or keys, head by head.
        head_dim: Width of a head.
    """
    return torch.unflatten(rows, 0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def apart(rows: Float[Tensor, "R D"], head_dim: int) -> Float[Tensor, "R D"]:
    """Undo :func:`alternate`.

    Args:
        rows: Of queries or keys, head by head.
        head_dim: Width of a head.
    """
    return torch.unflatten(rows, 0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def write_latents(
    owner: str,
    keys: Float[Tensor, "d D"],
    values: Float[Tensor, "d D"],
    prefix: str,
    gain: Float[Tensor, " D"],
    num_heads: int,
) -> dict[str, Tensor]:
    """Return keys and values of one key-value head in DeepSeek-V3's tensors.

    Args:
        owner: Name of the format.
        keys: Ours.
        values: Ours.
        prefix: Of the layer's names.
        gain: Of the norm before attention.
        num_heads: Query heads.

    Raises:
        ValueError: If a gain is 0.
    """
    if not bool(gain.all()):
        refuse(owner, f"a gain of {prefix}input_layernorm is 0, which latents cannot undo; take another format.")
    return {
        f"{prefix}self_attn.kv_a_proj_with_mqa.weight": torch.cat((torch.diag(1 / gain), alternate(keys, len(keys)))),
        f"{prefix}self_attn.kv_a_layernorm.weight": gain,
        f"{prefix}self_attn.kv_b_proj.weight": values.repeat(num_heads, 1),
    }


def read_latents(
    tensors: Tensors, prefix: str, width: int, head_dim: int, num_heads: int
) -> tuple[Float[Tensor, "d D"], Float[Tensor, "d D"]]:
    """Take keys and values that come from latents, if the latents are the layer's input.

    Args:
        tensors: Of the checkpoint.
        prefix: Of the layer's names.
        width: Width ``D`` of the layer's input.
        head_dim: Width ``d`` of a head.
        num_heads: Query heads.

    Raises:
        ValueError: If a tensor is missing, or something is compressed.
    """
    rows = tensors.take(f"{prefix}self_attn.kv_a_proj_with_mqa.weight", width + head_dim, width)
    gain = tensors.take(f"{prefix}self_attn.kv_a_layernorm.weight", width)
    values = tensors.take(f"{prefix}self_attn.kv_b_proj.weight", num_heads * head_dim, width)
    each = torch.unflatten(values, 0, (num_heads, head_dim))
    if not torch.equal(rows[:width], torch.diag(1 / gain)) or not torch.equal(each, each[:1].expand_as(each)):
        refuse(
            tensors.owner,
            f"{prefix}self_attn compresses keys and values, and our layers attend to them as they are; this model "
            "cannot be read.",
        )
    return apart(rows[width:], head_dim), each[0]
