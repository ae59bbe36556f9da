"""The founding paper's model, one position at a time, rotations as complex numbers; from its description.

Gloeckle et al. 2024 (arXiv 2404.19737): a Llama whose last layer is head 1, and extra heads that read what that layer
reads. Norm and output matrix are shared.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tests.reference.transformer import rms_norm


def _turn(rows: Tensor, num_heads: int, base: float) -> Tensor:
    """Rotate pairs of adjacent channels, ``(T, R)``."""
    length, head_dim = len(rows), rows.shape[1] // num_heads
    pairs = torch.view_as_complex(rows.reshape(length, num_heads, head_dim // 2, 2).contiguous())
    rates = base ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).reshape(length, num_heads, head_dim)


def _layer(state: dict[str, Tensor], prefix: str, x: Tensor, params: dict[str, Any]) -> Tensor:
    heads, kv_heads, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    base, length = params.get("rope_theta", 10000.0), len(x)
    weight = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    normed = rms_norm(x, weight["attention_norm.weight"], eps)
    queries = _turn(normed @ weight["attention.wq.weight"].T, heads, base)
    keys = _turn(normed @ weight["attention.wk.weight"].T, kv_heads, base)
    values = (normed @ weight["attention.wv.weight"].T).view(length, kv_heads, -1)
    mixed = torch.empty_like(queries)
    for head in range(heads):
        key, value = keys[:, head * kv_heads // heads], values[:, head * kv_heads // heads]
        scores = queries[:, head] @ key.T / key.shape[1] ** 0.5
        mixed[:, head] = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf).softmax(dim=-1) @ value
    x = x + mixed.flatten(1) @ weight["attention.wo.weight"].T
    normed = rms_norm(x, weight["ffn_norm.weight"], eps)
    opened = F.silu(normed @ weight["feed_forward.w1.weight"].T) * (normed @ weight["feed_forward.w3.weight"].T)
    return x + opened @ weight["feed_forward.w2.weight"].T


def every_head(state: dict[str, Tensor], params: dict[str, Any], tokens: Tensor) -> list[Tensor]:
    """Return the logits ``(T, V)`` of every head for one sequence ``(T,)``, in float64."""
    state = {name: value.double() for name, value in state.items()}
    x, last = state["tok_embeddings.weight"][tokens], params["n_layers"] - params["n_future_tokens"]
    for index in range(last):
        x = _layer(state, f"layers.{index}.", x, params)
    heads = [f"layers.{last}.", *(f"extra_heads.{index}." for index in range(params["n_future_tokens"] - 1))]
    states = [_layer(state, prefix, x, params) for prefix in heads]
    return [rms_norm(h, state["norm.weight"], params["norm_eps"]) @ state["output.weight"].T for h in states]
