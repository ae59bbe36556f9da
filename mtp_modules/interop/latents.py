"""Our attention with one key-value head, written as DeepSeek-V3's multi-head latent attention (MLA).

In MLA a matrix compresses the layer's input to a latent, a norm follows, and a second matrix maps the latent to every
query head's value and to the channels of its key that are not rotated. All rotated channels belong to one key that the
heads share. Our attention with one key-value head is a special case: every channel of the key is rotated, and the
latent is the layer's input itself. That input has passed a norm with a gain. The first matrix divides by the gain, and
the norm of the latent multiplies by it again. Our matrices are stored unchanged.

That norm must not rescale the latent: a normalised vector has a mean square a little below 1, by a share that depends
on the token. So the first matrix also makes the latent tiny, of a mean square of ``eps / 2**26`` at most. The norm
divides by ``sqrt(mean square + eps)``, which is then ``sqrt(eps)`` up to a factor of ``1 + 2**-27``: less than float32
resolves.
"""

import math

import torch

from mtp_modules.core.checks import refuse
from mtp_modules.core.shapes import Float, Tensor
from mtp_modules.interop.tensors import Tensors

EPS = 1e-6
"""Added to the mean square of a latent. vLLM takes ``rms_norm_eps``, transformers this number whatever that is."""

_SHRINK = 8192
"""How much smaller than ``sqrt(EPS)`` a latent is; a power of two, so gains are not rounded."""

_SCALE = math.sqrt(EPS) / _SHRINK


def interleave(rows: Float[Tensor, "R D"], head_dim: int) -> Float[Tensor, "R D"]:
    """Permute rows so that channels that are rotated together are adjacent, not half a head apart.

    Args:
        rows: Rows of the query or key matrix, head by head.
        head_dim: Width of a head.
    """
    return torch.unflatten(rows, 0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def deinterleave(rows: Float[Tensor, "R D"], head_dim: int) -> Float[Tensor, "R D"]:
    """Undo :func:`interleave`.

    Args:
        rows: Rows of the query or key matrix, head by head.
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
    """Return keys and values of one key-value head as DeepSeek-V3's tensors.

    Args:
        owner: Name of the format.
        keys: Our key matrix.
        values: Our value matrix.
        prefix: Prefix of the layer's tensor names.
        gain: Gain of the norm before attention.
        num_heads: Number of query heads.

    Raises:
        ValueError: If a gain is 0, or the type has too few small numbers.
    """
    if gain.dtype == torch.float16:
        refuse(owner, "latents are smaller than float16 has numbers; export the model in bfloat16 or float32.")
    if not bool(gain.all()):
        refuse(owner, f"a gain of {prefix}input_layernorm is 0, which latents cannot invert; use another format.")
    return {
        f"{prefix}self_attn.kv_a_proj_with_mqa.weight": torch.cat((_first_rows(gain), interleave(keys, len(keys)))),
        f"{prefix}self_attn.kv_a_layernorm.weight": gain * _SHRINK,
        f"{prefix}self_attn.kv_b_proj.weight": values.repeat(num_heads, 1),
    }


def read_latents(
    tensors: Tensors, prefix: str, width: int, head_dim: int, num_heads: int
) -> tuple[Float[Tensor, "d D"], Float[Tensor, "d D"]]:
    """Take the key and value matrices of latent attention whose latent is the layer's input.

    Args:
        tensors: Tensors of the checkpoint.
        prefix: Prefix of the layer's tensor names.
        width: Width ``D`` of the layer's input.
        head_dim: Width ``d`` of a head.
        num_heads: Number of query heads.

    Raises:
        ValueError: If a tensor is missing, or the latent compresses the input.
    """
    rows = tensors.take(f"{prefix}self_attn.kv_a_proj_with_mqa.weight", width + head_dim, width)
    gain = tensors.take(f"{prefix}self_attn.kv_a_layernorm.weight", width) / _SHRINK
    values = tensors.take(f"{prefix}self_attn.kv_b_proj.weight", num_heads * head_dim, width)
    each = torch.unflatten(values, 0, (num_heads, head_dim))
    if not torch.equal(rows[:width], _first_rows(gain)) or not torch.equal(each, each[:1].expand_as(each)):
        refuse(
            tensors.owner,
            f"{prefix}self_attn compresses keys and values, which our layers do not; this model cannot be read.",
        )
    return deinterleave(rows[width:], head_dim), each[0]


def _first_rows(gain: Float[Tensor, " D"]) -> Float[Tensor, "D D"]:
    """Return the matrix that takes a gain away and makes the latent tiny."""
    return torch.diag(_SCALE / gain)
