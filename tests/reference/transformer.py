"""The transformer layer, one query at a time, and documents read one at a time."""

import math

import torch
from torch import Tensor

from mtp_modules.core import Trunk
from mtp_modules.layers import TransformerLayer
from tests.reference.targets import same_document


def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by the root of the mean square, and scale."""
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * gain


def rotate(vector: Tensor, position: int, base: float = 10000.0) -> Tensor:
    """Rotate the plane of channels ``i`` and ``i + d/2`` by ``position * base ** (-2i/d)``."""
    half = len(vector) // 2
    rotated = torch.empty_like(vector)
    for i in range(half):
        angle = position * base ** (-i / half)
        rotated[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        rotated[i + half] = vector[i] * math.sin(angle) + vector[i + half] * math.cos(angle)
    return rotated


def transformer_layer(layer: TransformerLayer, x: Tensor) -> Tensor:
    """Read one sequence ``(T, D)``."""
    eps = layer.attention_norm.eps
    attention, length = layer.attention, len(x)
    heads, groups = attention.num_heads, attention.num_heads // attention.num_kv_heads
    qkv = rms_norm(x, layer.attention_norm.weight, eps) @ attention.qkv.weight.T
    qkv = qkv.view(length, attention.num_kv_heads, groups + 2, attention.head_dim)
    queries, keys, values = qkv[:, :, :groups].flatten(1, 2), qkv[:, :, groups], qkv[:, :, groups + 1]
    if attention.query_norm is not None:
        queries = rms_norm(queries, attention.query_norm.weight, eps)
        keys = rms_norm(keys, attention.key_norm.weight, eps)
    mixed = torch.empty_like(queries)
    for t in range(length):
        for head in range(heads):
            query = rotate(queries[t, head], t)
            scores = [query @ rotate(keys[s, head // groups], s) / attention.head_dim**0.5 for s in range(t + 1)]
            probs = torch.stack(scores).softmax(dim=0)
            mixed[t, head] = sum(probs[s] * values[s, head // groups] for s in range(t + 1))
    x = x + mixed.reshape(length, -1) @ attention.out.weight.T
    gate_up = rms_norm(x, layer.ffn_norm.weight, eps) @ layer.ffn.gate_up.weight.T
    blocks = gate_up.view(length, layer.ffn.num_blocks, 2, -1)
    gate, up = blocks[:, :, 0].flatten(1), blocks[:, :, 1].flatten(1)
    return x + (gate / (1 + (-gate).exp()) * up) @ layer.ffn.down.weight.T


def by_document(trunk: Trunk, tokens: Tensor, document_ids: Tensor) -> Tensor:
    """Read every document in a forward pass of its own; return hidden states, and behind them those of inner layers."""
    rows = []
    for b in range(len(tokens)):
        starts = [t for t in range(tokens.shape[1]) if t == 0 or not same_document(document_ids, b, t - 1, t)]
        ends = [*starts[1:], tokens.shape[1]]
        read = [trunk(tokens[b : b + 1, s:e]) for s, e in zip(starts, ends, strict=True)]
        rows.append(torch.cat([torch.cat((hidden, *features), dim=2)[0] for hidden, features in read]))
    return torch.stack(rows)
